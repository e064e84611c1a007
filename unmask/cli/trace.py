"""``unmask trace``: a page that plays the decoding of prompts step by step, under one policy or several."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import UseAppendAction

from unmask.cli import say
from unmask.cli.generate import Prompted
from unmask.cli.options import Decoding, Loading, Prompting
from unmask.cli.parsing import given
from unmask.files import check_writable
from unmask.sampling.config import SamplerConfig


class Trace(Prompted):
    """Decode prompts and write a page that plays it: which position was committed in which forward, how sure the model
    was of it, what was proposed and not taken, and what was revised. With several policies their decodings stand side
    by side. The page is one file, which needs no network.

    Prompts come from where `unmask generate` takes them.

    examples:
      unmask trace "Reverse the line: Tom, Ann, Eve."
      unmask trace "Name foods that begin with b, b." --policy threshold:0 --policy threshold:0.9 --output orders.html
      unmask trace "What is 12 * 13?" --model GSAI-ML/LLaDA-8B-Instruct --policy threshold:0.9 --device cuda
    """

    policy: UseAppendAction[tuple[str, ...]] = ()
    """Policy name, or folder of a learned one; once for each. None: the model's own, else threshold:0.9."""
    output: Path = Path("trace.html")
    """Page to write."""
    loading: Loading = Loading()
    prompting: Prompting = Prompting()
    decoding: Decoding = Decoding()

    def run(self) -> int:
        from unmask.policies.registry import make_policy
        from unmask.sampling.prompts import with_chat_template
        from unmask.sampling.sampler import Sampler

        check_writable(self.output)
        prompts = self.read_prompts(self.loading.model)
        asked = {**given(self.decoding, SamplerConfig), "record": True}
        policies = [make_policy(name) for name in self.policy]
        base = self.loading.sampler(None, {**asked, "alpha": None})
        tokenizer = with_chat_template(base.tokenizer, self.prompting.chat_template, self.prompting.system_prompt)
        samplers = [Sampler(base.model, tokenizer, policy) for policy in policies or [base.policy]]
        if asked.get("alpha") is not None and not any(sampler.policy.conditioned for sampler in samplers):
            raise ValueError("--alpha was given, but none of the policies is conditioned on alpha")
        for sampler in samplers:
            own = asked if sampler.policy.conditioned else {**asked, "alpha": None}
            sampler.config = sampler.config.updated(own)
            sampler.check_config(sampler.config)
        first, *others = [sampler.generate(prompts) for sampler in samplers]
        first.to_html(self.output, None, *others)
        say(self.output)
        return 0
