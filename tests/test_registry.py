"""The best backend that can run is chosen, a forced one never falls back, and every reason can be read."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from typing import Any

import pytest
import torch
from forests import random_qkv

import tree_attn
from tree_attn import (
    Backend,
    BackendUnavailable,
    Request,
    TreeMask,
    backends,
    explain,
    register_backend,
    registry,
    tree_attention,
    unregister_backend,
    use_backend,
)
from tree_attn._backends.reference import ReferenceBackend
from tree_attn._operator import make_request
from tree_attn.registry import Options

MASK = TreeMask.from_nodes([-1, 0, 0], [3, 2, 2])
Q, K, V = random_qkv(7, requires_grad=False, dtype=torch.float32)

pytestmark = pytest.mark.usefixtures("clean_registry")


class Recording(ReferenceBackend):
    """The reference under another name that counts its calls and may refuse."""

    def __init__(self, name: str, priority: int, reasons: tuple[str, ...] = (), remedy: str | None = None) -> None:
        self.name, self.priority = name, priority
        self.reasons, self.cure = list(reasons), remedy
        self.calls = self.asked = 0

    def supports(self, request: Request) -> list[str]:
        self.asked += 1
        return self.reasons

    def remedy(self, request: Request) -> str | None:
        return self.cure

    def forward(self, *arguments: Any) -> Any:
        self.calls += 1
        return super().forward(*arguments)


def run(**options: Any) -> torch.Tensor:
    return tree_attention(Q, K, V, MASK, **options)


@pytest.fixture
def two() -> tuple[Recording, Recording]:
    best, second = Recording("best", 1001), Recording("second", 1000)
    register_backend(second)
    register_backend(best)
    return best, second


# -- the list --------------------------------------------------------------------------------------------------------


def test_the_built_in_backends_are_listed_best_first() -> None:
    assert [b.name for b in backends()] == ["cuda", "flex", "sdpa", "reference"]


def test_registered_backends_take_their_place_by_priority(two: tuple[Recording, Recording]) -> None:
    assert [b.name for b in backends()][:2] == ["best", "second"]
    register_backend(Recording("last", -1))
    assert [b.name for b in backends()][-1] == "last"
    unregister_backend("best")
    assert backends()[0].name == "second"


def test_a_name_is_taken_once_unless_replaced(two: tuple[Recording, Recording]) -> None:
    with pytest.raises(ValueError, match="a backend named 'best' is registered; pass replace=True"):
        register_backend(Recording("best", 5))
    other = Recording("best", 1002)
    register_backend(other, replace=True)
    run()
    assert other.calls == 1
    assert two[0].calls == 0


def test_only_backends_with_a_name_and_a_priority_are_taken() -> None:
    with pytest.raises(TypeError, match=r"takes an instance of tree_attn\.Backend, not type"):
        register_backend(Recording)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes an instance of tree_attn\.Backend, not str"):
        register_backend("sdpa")  # type: ignore[arg-type]

    class Nameless(Backend):
        pass

    with pytest.raises(TypeError, match=r"Nameless needs a name \(str\) and a priority \(int\)"):
        register_backend(Nameless())


def test_removing_an_unknown_backend_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="there is no backend 'fa9'; choose one of: cuda, flex, sdpa, reference"):
        unregister_backend("fa9")


# -- choosing --------------------------------------------------------------------------------------------------------


def test_the_first_without_a_reason_runs(two: tuple[Recording, Recording]) -> None:
    best, second = two
    run()
    assert (best.calls, second.calls) == (1, 0)
    best.reasons = ["tired"]
    registry.reset()
    run()
    assert (best.calls, second.calls) == (1, 1)


def test_argument_beats_context_beats_environment_beats_priority(
    two: tuple[Recording, Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    third = Recording("third", 999)
    fourth = Recording("fourth", 998)
    register_backend(third)
    register_backend(fourth)

    def ran(**options: Any) -> str:
        before = {b.name: b.calls for b in backends() if isinstance(b, Recording)}
        assert explain(Q, K, V, MASK, **options).chosen is not None
        run(**options)
        (name,) = (b.name for b in backends() if isinstance(b, Recording) and b.calls > before[b.name])
        assert name == explain(Q, K, V, MASK, **options).chosen
        return name

    assert ran() == "best"
    monkeypatch.setenv("TREE_ATTN_BACKEND", "second")
    assert ran() == "second"
    with use_backend("third"):
        assert ran() == "third"
        assert ran(backend="fourth") == "fourth"
        with use_backend(None):
            assert ran() == "second"
        assert ran() == "third"
    assert ran() == "second"
    monkeypatch.setenv("TREE_ATTN_BACKEND", "")
    assert ran() == "best"
    monkeypatch.setenv("TREE_ATTN_BACKEND", "fourth")  # read anew at every call
    assert ran() == "fourth"


def test_a_forced_backend_never_falls_back(two: tuple[Recording, Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    best, second = two
    best.reasons = ["needs a newer driver", "needs more heads"]
    message = r"the forced backend 'best' cannot run torch\.float32 on cpu(.|\n)*best: needs a newer driver; needs more"
    with pytest.raises(BackendUnavailable, match=message):
        run(backend="best")
    with use_backend("best"), pytest.raises(BackendUnavailable, match=message):
        run()
    monkeypatch.setenv("TREE_ATTN_BACKEND", "best")
    with pytest.raises(BackendUnavailable, match=message):
        run()
    assert second.calls == 0


def test_when_nothing_can_run_every_reason_is_listed() -> None:
    for name in [b.name for b in backends()]:
        unregister_backend(name)
    register_backend(Recording("one", 2, ("no GPU",)))
    register_backend(Recording("other", 1, ("no compiler", "no luck")))
    with pytest.raises(BackendUnavailable) as caught:
        run(softcap=2.0, sinks=torch.zeros(4))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("no backend can run torch.float32 on cpu")
    assert lines[0].endswith(", with softcap, sinks")
    assert lines[1:] == ["  one: no GPU", "  other: no compiler; no luck"]


def test_an_unknown_name_is_an_error_wherever_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no backend 'fa9'; choose one of: cuda, flex, sdpa, reference"):
        run(backend="fa9")
    with pytest.raises(ValueError, match="there is no backend 'fa9'"), use_backend("fa9"):
        pass
    assert registry.forced_in_thread() is None
    monkeypatch.setenv("TREE_ATTN_BACKEND", "fa9")
    with pytest.raises(ValueError, match=r"^TREE_ATTN_BACKEND is 'fa9', but there is no backend 'fa9'; choose one of"):
        run()
    with pytest.raises(ValueError, match=r"^TREE_ATTN_BACKEND is 'fa9'"):
        explain(Q, K, V, MASK)


def test_a_choice_is_asked_for_once_and_again_after_the_list_changed(two: tuple[Recording, Recording]) -> None:
    best, _ = two
    for _ in range(5):
        run()
    assert best.asked == 1
    run(softcap=1.0)  # another request
    assert best.asked == 2
    register_backend(Recording("new", 0))
    run()
    assert best.asked == 3


def test_the_request_does_not_depend_on_the_number_of_tokens(two: tuple[Recording, Recording]) -> None:
    """A choice that did would make a model's numbers depend on the batch."""
    for tokens in (1, 7, 300):
        q, k, v = random_qkv(tokens, dtype=torch.float32, requires_grad=False)
        tree_attention(q, k, v, TreeMask.from_nodes([-1], [tokens]))
    assert two[0].asked == 1


@pytest.mark.speed
def test_choosing_costs_under_5_microseconds_a_call() -> None:
    """All of it: describing the request, asking what is forced, looking the choice up."""
    ranges, options = MASK.ranges(), Options(0.5)
    calls = 2000

    def choose() -> float:
        start = time.thread_time()
        for _ in range(calls):
            registry.select(make_request(Q, K, V, None, ranges, options), registry.forced(None))
        return (time.thread_time() - start) / calls

    choose()
    assert min(choose() for _ in range(20)) < 5e-6


# -- use_backend -----------------------------------------------------------------------------------------------------


def test_use_backend_is_undone_when_the_block_raises() -> None:
    def fail() -> None:
        with use_backend("reference"):
            with use_backend("sdpa"):
                pass
            assert registry.forced_in_thread() == "reference"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert registry.forced_in_thread() is None


def test_use_backend_decorates_a_function() -> None:
    @use_backend("reference")
    def inside() -> str | None:
        return registry.forced_in_thread()

    assert [inside(), registry.forced_in_thread(), inside()] == ["reference", None, "reference"]


def test_use_backend_holds_in_its_own_thread_alone() -> None:
    """Blocks of threads overlap in any order without touching each other."""
    barrier = threading.Barrier(3, timeout=30)
    seen: dict[str, list[str | None]] = {}

    def work(name: str | None, first_out: bool) -> None:
        mine = seen.setdefault(str(name), [])
        with use_backend(name):
            barrier.wait()
            mine.append(registry.forced_in_thread())
            barrier.wait()
            if not first_out:
                barrier.wait()
                mine.append(registry.forced_in_thread())
        if first_out:
            barrier.wait()
        mine.append(registry.forced_in_thread())

    arguments = [("sdpa", True), ("reference", False), ("flex", True)]
    threads = [threading.Thread(target=work, args=a) for a in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"sdpa": ["sdpa", None], "reference": ["reference", "reference", None], "flex": ["flex", None]}
    assert registry.forced_in_thread() is None


def test_coroutines_that_do_not_await_inside_the_block_do_not_meet() -> None:
    async def work(name: str) -> str | None:
        await asyncio.sleep(0)
        with use_backend(name):
            return registry.forced_in_thread()

    async def all_of_them() -> list[str | None]:
        return await asyncio.gather(work("sdpa"), work("reference"), work("sdpa"))

    assert asyncio.run(all_of_them()) == ["sdpa", "reference", "sdpa"]
    assert registry.forced_in_thread() is None


# -- a better backend that is missing --------------------------------------------------------------------------------


def collected(call: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if "tree_attn" in str(w.message)]


def test_a_missing_better_backend_is_told_about_once_with_the_remedy() -> None:
    fast = Recording("fast", 1001, ("its library is not built",), "Install it: pip install fast")
    register_backend(fast)
    (warning,) = collected(run)
    assert str(warning.message) == (
        "tree_attn: the 'fast' backend would be faster here, but: its library is not built. "
        "Install it: pip install fast"
    )
    assert warning.category is UserWarning
    assert warning.filename == __file__  # it points at the caller's line
    assert collected(run) == []
    assert collected(lambda: run(softcap=1.0)) == []  # another request, the same process
    registry.reset()
    assert collected(run) == []


def test_only_the_best_missing_backend_is_told_about() -> None:
    register_backend(Recording("fastest", 1002, ("no such GPU",)))  # nothing would help: no remedy
    register_backend(Recording("fast", 1001, ("not built",), "Install fast"))
    register_backend(Recording("quick", 1000, ("not built",), "Install quick"))
    (warning,) = collected(run)
    assert "'fast' backend" in str(warning.message)


def test_nobody_is_told_who_forced_a_choice_or_has_the_best() -> None:
    register_backend(Recording("fast", 1001, ("not built",), "Install fast"))
    assert collected(lambda: run(backend="reference")) == []
    register_backend(Recording("fastest", 1002))
    assert collected(run) == []


def test_a_warning_turned_into_an_error_is_raised_once() -> None:
    register_backend(Recording("fast", 1001, ("not built",), "Install fast"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Install fast"):
            run()
        run()


# -- explain ---------------------------------------------------------------------------------------------------------


def test_explain_shows_the_choice_and_every_reason(two: tuple[Recording, Recording]) -> None:
    best, _ = two
    best.reasons = ["no such GPU"]
    found = explain(Q, K, V, MASK, window=4)
    assert found.chosen == "second"
    assert found.forced is None
    assert found.reasons["best"] == ["no such GPU"]
    assert found.reasons["second"] == found.reasons["reference"] == []
    assert list(found.reasons) == ["best", "second", "cuda", "flex", "sdpa", "reference"]
    text = str(found).splitlines()
    assert text[0] == (
        "tree_attention: torch.float32 on cpu, 4 heads, 2 key/value heads, head_dim 8, value_dim 8, with window"
    )
    assert text[1] == "   best       no such GPU"
    assert text[2].startswith("-> second     runs")
    assert any(line.startswith("   reference  could run") for line in text)


def test_explain_says_what_is_forced_and_when_nothing_can_run(two: tuple[Recording, Recording]) -> None:
    found = explain(Q, K, V, MASK, backend="second")
    assert (found.chosen, found.forced) == ("second", "second")
    assert "forced: second" in str(found)
    two[1].reasons = ["ill"]
    found = explain(Q, K, V, MASK, backend="second")
    assert found.chosen is None
    assert str(found).endswith("nothing can run this request")


def test_without_a_gpu_explain_says_why_the_kernels_do_not_run() -> None:
    found = explain(Q, K, V, MASK)
    assert found.reasons["cuda"]
    assert found.chosen in ("flex", "sdpa")


# -- entry points ----------------------------------------------------------------------------------------------------


class Entry:
    def __init__(self, name: str, loaded: Any) -> None:
        self.name, self.value, self.loaded = name, f"package.module:{name}", loaded

    def load(self) -> Any:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """What installed packages name in the group ``tree_attn.backends``, not loaded yet."""
    found: list[Entry] = []

    def lookup(group: str) -> list[Entry]:
        assert group == "tree_attn.backends"
        return found

    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lookup)
    monkeypatch.setattr(registry, "_entry_points_loaded", False)
    return found


def test_a_package_may_bring_a_backend_as_an_instance_or_a_class(entry_points: list[Entry]) -> None:
    class Plugin(Recording):
        def __init__(self) -> None:
            super().__init__("from a class", 1001)

    instance = Recording("from an instance", 1002)
    entry_points += [Entry("a", Plugin), Entry("b", instance)]
    run()
    assert instance.calls == 1
    run(backend="from a class")
    assert [b.name for b in backends()][:2] == ["from an instance", "from a class"]


def test_a_name_from_a_package_can_be_forced_at_once(
    entry_points: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = Recording("plugin", -5)
    entry_points.append(Entry("plugin", plugin))
    monkeypatch.setenv("TREE_ATTN_BACKEND", "plugin")
    run()
    assert plugin.calls == 1


def test_a_broken_package_is_told_about_and_takes_nothing_down(entry_points: list[Entry]) -> None:
    entry_points += [Entry("broken", ImportError("no module named fast")), Entry("odd", "not a backend")]
    messages = [str(w.message) for w in collected(run)]
    assert len(messages) == 2
    assert "backend 'broken'" in messages[0]
    assert "ImportError: no module named fast" in messages[0]
    assert run().shape == Q.shape
    reasons = explain(Q, K, V, MASK).reasons
    assert reasons["broken"] == [
        "entry point 'package.module:broken' failed to load: ImportError: no module named fast"
    ]
    assert "takes an instance of tree_attn.Backend, not str" in reasons["odd"][0]


def test_the_public_names_are_those_of_the_contract() -> None:
    for name in ("Backend", "BackendUnavailable", "Request", "Options", "RowRanges", "backends", "explain"):
        assert name in tree_attn.__all__
    assert all(hasattr(tree_attn, name) for name in tree_attn.__all__)
