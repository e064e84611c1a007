"""lm-evaluation-harness: the Sampler as a model of it; ``python -m unmask.integrations.lm_eval`` is its command line.

In Python, importing :mod:`unmask.integrations.lm_eval.model` registers the model under the name "unmask". A task's
file that names something of that module by ``!function`` imports it, too. The entry point "unmask" in the group
"lm_eval.models" is for releases that will look for some: 0.4.13, the latest, does not.
"""
