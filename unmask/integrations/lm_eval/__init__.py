"""lm-evaluation-harness: the Sampler as a model of it; ``python -m unmask.integrations.lm_eval`` is its command line.

In Python, importing :mod:`unmask.integrations.lm_eval.model` registers the model under the name "unmask". The entry
point of the same name in the group "lm_eval.models" is for releases of the harness after 0.4.13, which read it.
"""
