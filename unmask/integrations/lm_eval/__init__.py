"""lm-evaluation-harness: the Sampler as a model of it; ``python -m unmask.integrations.lm_eval`` is its command line.

In Python, importing :mod:`unmask.integrations.lm_eval.model` registers the model under the name "unmask".
"""
