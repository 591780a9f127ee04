"""One factory makes samplers, so that there is one place to choose them in."""

from __future__ import annotations

from rl_lora.config import EpisodeConfig
from rl_lora.sampler.factory import make_sampler
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Sampler
from tests import ROOT
from tests.oracles import tiny_policy


def test_the_sampler_has_the_limits_of_the_configuration() -> None:
    sampler: Sampler = make_sampler(tiny_policy(), EpisodeConfig(max_rows=7, max_cache_gib=0.5, check_every=3))
    assert isinstance(sampler, NativeSampler)
    assert (sampler.max_rows, sampler.max_cache_gib, sampler.check_every) == (7, 0.5, 3)
    assert sampler.compiled is None


def test_nothing_but_the_factory_makes_samplers() -> None:
    paths = [path for folder in ("rl_lora", "scripts") for path in (ROOT / folder).rglob("*.py")]
    makers = {path.name for path in paths if "NativeSampler(" in path.read_text(encoding="utf-8")}
    assert makers == {"factory.py"}
