"""Any order of loading, asking, asking at once, leaving early and asking for what cannot be served: answers are always
those of the adapter that was asked for, and nothing is left behind."""

import asyncio
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from pefomed_ray.model.generate import Prompt
from pefomed_ray.serving.contract import AdapterRef, Ask, CannotServeError, Completion, Sampling
from tests.tiny_served import png
from tests.unit.serving.engine.conftest import Shown

TIMEOUT_S = 60
ADAPTERS = st.integers(0, 3)
TOKENS = st.sampled_from((1, 5, 12))
SHADES = st.integers(0, 2)


@pytest.mark.parametrize(("examples", "steps"), [(4, 12), pytest.param(40, 30, marks=pytest.mark.long)])
def test_any_order_of_things(shown: Shown, examples: int, steps: int) -> None:
    machine = machine_over(shown)
    limits = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=limits)


def machine_over(shown: Shown) -> type[RuleBasedStateMachine]:
    """Two slots for four adapters."""

    @cache
    def expected(adapter: int, shade: int, tokens: int) -> str:
        return shown.offline[adapter].answer([Prompt("vqa", "Is it?", (png(shade),))], tokens)[0].text

    def ask_of(adapter: int, shade: int, tokens: int) -> Ask:
        return Ask("vqa", "Is it?", (png(shade),), shown.refs[adapter], Sampling(tokens))

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.loop = asyncio.new_event_loop()
            self.open = shown.engine(max_adapters=2)
            self.engine = self.open.__enter__()

        def run(self, work: Any) -> Any:
            return self.loop.run_until_complete(asyncio.wait_for(work, TIMEOUT_S))

        @rule(adapter=ADAPTERS)
        def load(self, adapter: int) -> None:
            self.run(self.engine.load(shown.refs[adapter]))

        @rule(asked=st.lists(st.tuples(ADAPTERS, SHADES, TOKENS), min_size=1, max_size=6))
        def ask_at_once(self, asked: list[tuple[int, int, int]]) -> None:
            async def all_of_them() -> list[Completion]:
                return list(await asyncio.gather(*(self.engine.answer(ask_of(*one)) for one in asked)))

            for one, said in zip(asked, self.run(all_of_them()), strict=True):
                assert (said.text, said.digest) == (expected(*one), shown.refs[one[0]].digest)

        @rule(adapter=ADAPTERS, shade=SHADES)
        def leave_early(self, adapter: int, shade: int) -> None:
            async def begin() -> None:
                pieces = self.engine.stream(ask_of(adapter, shade, 40))
                await anext(pieces)
                await pieces.aclose()

            self.run(begin())

        @rule()
        def ask_for_what_cannot_be_served(self) -> None:
            ref = AdapterRef("0" * 64, str(Path(shown.refs[0].bundle)))
            with pytest.raises(CannotServeError):
                self.run(self.engine.answer(Ask("vqa", "Is it?", (png(0),), ref, Sampling(3))))

        @invariant()
        def nothing_is_left_behind(self) -> None:
            stats = self.engine.stats()
            assert self.engine.healthy()
            assert (stats.running, stats.waiting) == (0, 0)
            assert stats.adapters <= 2

        def teardown(self) -> None:
            self.open.__exit__(None, None, None)
            self.loop.close()

    return Machine
