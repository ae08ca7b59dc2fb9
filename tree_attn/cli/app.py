"""The commands of ``tree-attn``: arguments in, measurements from the modules beside this one, tables and JSON out."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tree_attn._version import __version__
from tree_attn.cli import hint, missing
from tree_attn.rollouts import SHIPPED, Rollout, read_rollouts

if TYPE_CHECKING:
    from tree_attn.cli.bench import Results, Row, Setup
    from tree_attn.cli.compare import Comparison
    from tree_attn.mask import TreeMask

app = typer.Typer(
    name="tree-attn",
    help="Exact attention on trees: every token sees its ancestors and itself, in one pass.",
    no_args_is_help=True,
    add_completion=False,
)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes the GPU if torch can use one.")]
_FILE_HELP = "JSON lines of rollouts, 'text' or 'tokens' each. The rollouts that ship with tree_attn when left out."


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"tree-attn {__version__}")
        raise typer.Exit


# -- doctor ----------------------------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """What is installed, what each backend says about this machine, and what to install."""
    from tree_attn.cli import doctor

    print(doctor.as_json() if as_json else doctor.as_text())


# -- demo ------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    file: Annotated[Path, typer.Argument(help=_FILE_HELP, show_default=False)] = SHIPPED,
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture to write.")] = Path("tree-attn-demo.png"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps, each with every rollout.")] = 3,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first rollouts of the file.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most unique tokens in one packed batch.")] = 32768,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (autocast).")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; those that are idle when left out.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a small transformer both ways, tree and path by path, and compare losses, gradients and time."""
    _need("demo", "matplotlib", "numpy")
    from tree_attn.cli import picture
    from tree_attn.cli.compare import DTYPES, compare

    with _errors():
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; give one of {', '.join(DTYPES)}")
        picture.checked(output)
        where = _device(device)
        torch.set_num_threads(threads or idle_cpus())
        rollouts = read_rollouts(file)[:limit]
        title, mask, labels = _tree_of(file, rollouts)
        with _progress(quiet=as_json) as bar:
            task = bar.add_task("training", total=2 * steps)

            def on_step(step: int, way: str) -> None:
                bar.update(task, advance=1, description=f"step {step + 1}, {'tree' if way == 'tree' else 'paths'}")

            result = compare(rollouts, steps=steps, max_tokens=max_tokens, device=where, dtype=dtype, on_step=on_step)
        picture.draw(mask, output, title=title, labels=labels)
    if as_json:
        print(json.dumps({**asdict(result), "same": result.same, "picture": str(output)}, indent=2))
    else:
        _print_demo(result, file, output)
    if not result.same:
        raise typer.Exit(1)


def _print_demo(result: Comparison, file: Path, output: Path) -> None:
    from tree_attn.cli.bench import machine

    out = Console(highlight=False, soft_wrap=True)
    name = "the rollouts that ship with tree_attn" if file == SHIPPED else str(file)
    prompts = f"{result.groups} prompt{'s' * (result.groups > 1)}"
    out.print(f"{result.sequences} sequences of {prompts}, from {name}; {result.weighting}", markup=False)
    out.print(
        f"model: {result.parameters:,} parameters, 2 layers, grouped-query attention, RoPE by depth; "
        f"{result.dtype} on {machine(result.device)}"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "path by path", "tree", ""):
        table.add_column(column, justify="left" if not column else "right")
    batches = f" in {result.batches} batches" if result.batches > 1 else ""
    table.add_row(
        "tokens",
        f"{result.tokens_paths:,}",
        f"{result.tokens_tree:,}{batches}",
        _saved(result.tokens_paths, result.tokens_tree),
    )
    table.add_row(
        "attention pairs",
        f"{result.pairs_paths:,}",
        f"{result.pairs_tree:,}",
        _saved(result.pairs_paths, result.pairs_tree),
    )
    for step, (paths, tree) in enumerate(zip(result.loss_paths, result.loss_tree, strict=True), 1):
        table.add_row(f"loss, step {step}", f"{paths:.6f}", f"{tree:.6f}", "")
    slow, fast = min(result.seconds_paths), min(result.seconds_tree)
    table.add_row("best step", f"{slow:.2f} s", f"{fast:.2f} s", f"{slow / fast:.2f}x as fast")
    out.print(table)
    out.print(
        f"largest difference of any gradient: {result.gradient_difference:.1e} relative "
        f"(allowed below {result.gradient_bound:.0e})"
    )
    if result.same:
        out.print("[green]The two ways train the same model.[/green]")
    else:
        out.print("[bold red]THE GRADIENTS DIFFER: the tree does not train the same model as its paths.[/bold red]")
    out.print(f"backend: {result.explanation.chosen}, because")
    out.print(str(result.explanation), markup=False, style="dim")
    out.print(f"picture: {output}")


def _saved(before: int, after: int) -> str:
    return f"{1 - after / before:.1%} saved, {before / after:.2f}x less"


# -- show ------------------------------------------------------------------------------------------------------------


@app.command()
def show(
    file: Annotated[
        Path,
        typer.Argument(
            help=f"{_FILE_HELP} Or a .json file of {{parents, lengths}}: nodes, depth-first.", show_default=False
        ),
    ] = SHIPPED,
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture: .png, .svg or .pdf.")] = Path("tree.png"),
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first rollouts of the file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw the tree of a file of rollouts and its mask."""
    _need("show", "matplotlib", "numpy")
    from tree_attn.cli import picture

    labels: list[tuple[int, str]] = []
    with _errors():
        picture.checked(output)
        if file.suffix == ".json":
            title, mask = file.name, _mask_of_nodes(file)
        else:
            title, mask, labels = _tree_of(file, read_rollouts(file)[:limit])
        begin = time.perf_counter()
        picture.draw(mask, output, title=title, labels=labels)
    said: dict[str, Any] = {
        "picture": str(output),
        "tokens": mask.total,
        "trees": len(mask.roots),
        "visible_pairs": mask.visible_pairs(),
        "seconds": round(time.perf_counter() - begin, 3),
    }
    print(json.dumps(said, indent=2) if as_json else f"{title}\n{mask!r}\nwrote {output}")


def _mask_of_nodes(file: Path) -> TreeMask:
    from tree_attn.mask import TreeMask

    nodes = json.loads(file.read_bytes())
    if not isinstance(nodes, dict) or not {"parents", "lengths"} <= set(nodes):
        raise ValueError(
            f"{file} is no JSON object with 'parents' and 'lengths', one entry a node in depth-first order"
        )
    return TreeMask.from_nodes(nodes["parents"], nodes["lengths"])


def _tree_of(file: Path, rollouts: list[Rollout]) -> tuple[str, TreeMask, list[tuple[int, str]]]:
    """Title, mask, and each group's name at the last token that all its rollouts share."""
    from tree_attn.packing import pack

    batch = pack([r.tokens for r in rollouts])
    groups: dict[str, list[list[int]]] = {}
    for rollout, index in zip(rollouts, batch.token_index, strict=True):
        if rollout.group is not None:
            groups.setdefault(rollout.group, []).append(index.tolist())
    labels = []
    for name, paths in groups.items():
        shared = 0
        while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
            shared += 1
        if shared:
            labels.append((paths[0][shared - 1], name))
    prompts = f" of {len(groups)} prompts" if groups else ""
    saved = batch.summary()
    title = (
        f"{file.name}: {len(rollouts)} sequences{prompts}, {saved.tokens_before:,} tokens in "
        f"{saved.tokens_after:,} ({saved.token_saving:.0%} saved)"
    )
    return title, batch.mask, labels


# -- bench -----------------------------------------------------------------------------------------------------------


@app.command()
def bench(
    peers: Annotated[
        str, typer.Option(help="What to compare with, by commas: fa4, fa2, flex, paths, sdpa, hopper, portable.")
    ] = "flex,paths,sdpa",
    workloads: Annotated[
        str, typer.Option(help="Which trees, by commas; all of a size that suits the device when left out.")
    ] = "",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Plot to write: .png, .svg or .pdf.")] = None,
    saved: Annotated[
        Path | None, typer.Option("--from", help="Measure nothing: show what --json printed into this file.")
    ] = None,
    device: DeviceOption = "auto",
    heads: Annotated[str, typer.Option(help="Query heads, key/value heads, head dim; by device when left out.")] = "",
    runs: Annotated[int, typer.Option(min=1, help="Measure everything this often; medians count.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; those that are idle when left out.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Time this project against what else computes attention on trees on this machine, forward and backward."""
    if output is not None:
        _need("bench -o", "matplotlib", "numpy")
    from tree_attn.cli.bench import Results, Setup

    with _errors():
        if output is not None:
            from tree_attn.cli import bars, picture

            picture.checked(output)
        if saved is not None:
            results = Results.from_json(saved.read_text())
        else:
            torch.set_num_threads(threads or idle_cpus())
            setup = Setup.of_device(_device(device))
            if heads:
                query, shared, size = _heads(heads)
                setup = replace(setup, heads=query, kv_heads=shared, head_dim=size)
            names = list(dict.fromkeys(["tree_attn", *_split(peers)]))
            results = _measure(_split(workloads) or setup.workloads, names, setup, runs, quiet=as_json)
        if output is not None:
            bars.draw(results, output)
    if as_json:
        print(results.to_json())
        return
    _print_bench(results)
    if output is not None:
        print(f"plot: {output}")


def _measure(workloads: list[str], peers: list[str], setup: Setup, runs: int, quiet: bool) -> Results:
    from tree_attn.cli import bench

    with _progress(quiet) as bar:
        task = bar.add_task("matrix product", total=runs * len(workloads) * len(peers))
        return bench.measure(
            workloads,
            peers,
            setup,
            runs,
            on_start=lambda workload, peer: bar.update(task, description=f"{workload}: {peer}"),
            on_row=lambda row: bar.advance(task),
        )


def _print_bench(results: Results) -> None:
    out = Console(highlight=False, soft_wrap=True)
    heads, kv_heads, head_dim = results.heads
    out.print(
        f"{results.machine}, torch {results.torch}, tree_attn {results.tree_attn}"
        f"{f' at {results.commit}' if results.commit else ''}; {heads}/{kv_heads} heads, head dim {head_dim}, "
        f"{results.dtype}; a matrix product of {results.matmul_size} x {results.matmul_size} runs at "
        f"{_significant(results.matmul_tflops)} TFLOP/s",
        markup=False,
    )
    for workload in dict.fromkeys(row.workload for row in results.rows):
        ran = [row for row in results.rows if row.workload == workload and not row.why_not]
        if ran:
            out.print(_bench_table(ran))
    said: dict[tuple[str, str], list[str]] = {}  # a line for each thing that a peer says, and the workloads it is about
    for row in results.rows:
        if row.why_not or row.note:
            said.setdefault((row.peer, row.note or f"cannot run here: {row.why_not}"), []).append(row.workload)
    of_peer = Counter(row.peer for row in results.rows)
    for (peer, words), about in sorted(said.items(), key=lambda item: list(of_peer).index(item[0][0])):
        where = "" if len(about) == of_peer[peer] else f" on {', '.join(about)}"
        out.print(f"{peer}{where}: {words}", markup=False, style="dim")


def _bench_table(rows: list[Row]) -> Table:
    """The peers on one workload."""
    table = Table(box=None, header_style="bold", pad_edge=False, title=f"{rows[0].workload}, {rows[0].tokens:,} tokens")
    table.title_justify = "left"
    for column in ("peer", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "tree_attn is", "error"):
        table.add_column(column, justify="left" if column == "peer" else "right", no_wrap=True)
    ours = next((row.total_ms for row in rows if row.peer == "tree_attn"), None)
    for row in rows:
        times = (row.forward_ms, row.forward_tflops, row.backward_ms, row.backward_tflops)
        both = row.total_ms
        speed = f"{both / ours:.2f}x as fast" if both and ours and row.peer != "tree_attn" else ""
        table.add_row(row.peer, *map(_significant, times), speed, f"{row.error:.1e}")
    return table


def _significant(number: float | None) -> str:
    """At least three digits."""
    return "-" if number is None else f"{number:,.0f}" if number >= 100 else f"{number:#.3g}"


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _heads(text: str) -> tuple[int, int, int]:
    numbers = [int(part) if part.isdigit() else 0 for part in _split(text)]
    if len(numbers) != 3 or min(numbers) < 1 or numbers[0] % numbers[1]:
        raise ValueError(
            f"heads is {text!r}; give query heads, key/value heads and head dim, the first a multiple of the second, "
            "for instance 8,2,64"
        )
    return numbers[0], numbers[1], numbers[2]


# -- shared ----------------------------------------------------------------------------------------------------------


def idle_cpus(seconds: float = 0.3) -> int:
    """How many CPUs nobody uses right now, at least one. torch's threads wait for one another at every operation, so
    one thread more than there are idle CPUs costs far more than it brings. All of torch's threads where the system does
    not tell."""
    before = _ticks()
    if before:
        time.sleep(seconds)
        passed = [(idle - i, total - t) for (idle, total), (i, t) in zip(_ticks(), before, strict=False)]
        idle = sum(i / t for i, t in passed if t)
        return max(1, min(torch.get_num_threads(), round(idle)))
    return torch.get_num_threads()


def _ticks() -> list[tuple[int, int]]:
    """(idle, all) clock ticks of each CPU that this process may use; empty where there is no /proc/stat."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return []
    mine = {f"cpu{index}" for index in os.sched_getaffinity(0)}
    counts = (line.split() for line in stat.read_text().splitlines())
    return [(int(c[4]) + int(c[5]), sum(map(int, c[1:9]))) for c in counts if c and c[0] in mine]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts when it was built without CUDA
        raise ValueError(f"cannot use device {name!r}: {str(error).splitlines()[0]}") from error
    return name


def _need(command: str, *modules: str) -> None:
    absent = missing(*modules)
    if absent:
        typer.echo(hint(command, absent), err=True)
        raise typer.Exit(2)


@contextmanager
def _errors() -> Iterator[None]:
    """Errors that the user can do something about, as one line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A progress bar on stderr, so that stdout holds the result alone."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        yield bar
