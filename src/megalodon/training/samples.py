"""Continuations of a prompt while a model trains, for people to read."""

from __future__ import annotations

from megalodon.data import Tokenizer
from megalodon.inference import Sampling, Session, generate_text
from megalodon.models import CausalLM
from megalodon.training.config import SamplingConfig


def sample_text(model: CausalLM, tokenizer: Tokenizer, config: SamplingConfig) -> str:
    """What the model goes on with after the prompt.

    Always from the same seed, so that samples differ by what was learnt; the global generators are not touched. The
    model is left in the mode that it was in.
    """
    training = model.training
    model.eval()
    try:
        session = Session(model, seed=0, vocab_size=tokenizer.vocab_size)
        session.read(tokenizer.encode(config.prompt))
        how = Sampling(temperature=config.temperature, top_p=config.top_p)
        return "".join(generate_text(session, tokenizer, config.max_new_tokens, how))
    finally:
        model.train(training)
