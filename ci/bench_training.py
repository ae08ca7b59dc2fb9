"""One optimiser step of a Qwen3-0.6B-shaped model on trees, beside the same step on packed sequences.

    python ci/bench_training.py run [--workloads a,b,c] [--json FILE]      # on one GPU, under 150 seconds
    python ci/bench_training.py run --tiny                                 # everything on a CPU, in seconds
    python ci/bench_training.py plot FILE --out docs/images/training.png

Three arms on one model with random weights:

    tree      sequences merged on shared prefixes; this library's attention
    paths     sequences packed one after the other; the fastest attention that torch has for them here
    gather    merged as in ``tree``; each node's queries against a copy of its whole path's keys and values, as TRL's
              AsyncGRPO does, by the fastest attention that torch has for that here

The arms share everything but packing and attention: bfloat16 weights, gradients and optimiser state; the summed
cross-entropy of every sequence's targets (all tokens after the prompt), with logits at targets alone, 4096 rows at a
time and recomputed in the backward pass; activation checkpointing of every layer; one micro-batch; fused AdamW. The
learning rate is 0, so that each step does the same work on the same weights. Packing, masks and offsets are made before
the clock starts.

Numbers are right if, on three sequences, the gradients of tree and gather are as near to float32 (path by path) as
those of paths are, and on the whole workload all arms agree on the loss and, within that error, on the gradients. A
control that lets siblings see one another must fail.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import training_attention as attention
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

import tree_attn
from tree_attn import PackedBatch, TreeMask, pack
from tree_attn.cli.workloads import WORKLOADS, Nodes

ARMS = ("tree", "paths", "gather")
# letter: (tree of tree_attn.cli.workloads, what it is, times as fast as paths, share of the time that gather takes)
CASES = {
    "a": ("grpo4k_16x1k", "16 responses of 1024 on a prompt of 4096", 2.6, 1.0),
    "b": ("agent32k", "an agent's tree of 32 768 tokens", 3.0, 0.85),
    "c": ("dpo_8x(1k+2x512)", "8 pairs of 512 on prompts of 1024", 1.3, 1.0),
}
WAYS = "varlen,varlen-repeated,cudnn,cudnn-repeated"
SHARE = 0.9  # of the ratio of operations
MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
SMALLER = 256  # what --tiny divides lengths by
CHUNK = 4096  # rows of logits at a time
_began = time.perf_counter()


# -- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A forest of token sequences; targets are the tokens after the root."""

    name: str
    nodes: Nodes
    sequences: list[list[int]]  # of every leaf, from the root, in depth-first order
    targets: list[list[bool]]

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

    def part(self) -> Workload:
        """The first two sequences and the last alone; the nodes are those of the merged sequences."""
        some = (0, 1, -1)
        sequences, targets = [self.sequences[i] for i in some], [self.targets[i] for i in some]
        return Workload(self.name, nodes_of(pack(sequences)), sequences, targets)


def make_workload(name: str, nodes: Nodes, vocab: int, seed: int = 0) -> Workload:
    """Random tokens; siblings differ in their first token, so that nothing merges but what the tree says."""
    generator = torch.Generator().manual_seed(seed)
    used: dict[int, set[int]] = {}
    paths: list[list[int]] = []
    roots: list[int] = []
    for parent, length in nodes:
        own = torch.randint(vocab, (length,), generator=generator).tolist()
        while own[0] in used.setdefault(parent, set()):
            own[0] = (own[0] + 1) % vocab
        used[parent].add(own[0])
        paths.append(paths[parent] + own if parent >= 0 else own)
        roots.append(roots[parent] if parent >= 0 else length)
    inner = {parent for parent, _ in nodes}
    leaves = [i for i in range(len(nodes)) if i not in inner]
    sequences = [paths[i] for i in leaves]
    return Workload(name, nodes, sequences, [[t >= roots[i] for t in range(len(paths[i]))] for i in leaves])


def nodes_of(batch: PackedBatch) -> Nodes:
    """The merged sequences as nodes: a token begins one unless it is the only child of the token before it."""
    parent = batch.parent.tolist()
    children = [0] * len(parent)
    for p in parent:
        if p >= 0:
            children[p] += 1
    begins = [t for t, p in enumerate(parent) if p != t - 1 or p < 0 or children[p] > 1]
    node = {begin: i for i, begin in enumerate(begins)}
    of_token = [0] * len(parent)
    for t in range(len(parent)):
        of_token[t] = node[t] if t in node else of_token[t - 1]
    ends = [*begins[1:], len(parent)]
    return [(of_token[parent[b]] if parent[b] >= 0 else -1, e - b) for b, e in zip(begins, ends, strict=True)]


# -- arms ------------------------------------------------------------------------------------------------------------


@dataclass
class Arm:
    """What goes through the model, and where its targets are."""

    name: str
    inputs: dict[str, Any]
    rows: Tensor  # int64 (targets,) positions whose logits predict a target
    labels: Tensor  # int64 (targets,)
    weights: Tensor  # float32 (targets,): how many sequences have this target here
    pairs: int  # (query, key) pairs that attention needs
    implementation: str
    chosen: str
    tried: dict[str, float | str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]


def tree_arm(workload: Workload, device: torch.device) -> Arm:
    from tree_attn.integrations.transformers import model_inputs

    batch = pack(workload.sequences, loss_mask=workload.targets).to(device)
    expected = TreeMask.from_nodes([p for p, _ in workload.nodes], [n for _, n in workload.nodes], device=device)
    assert torch.equal(batch.mask.subtree_end, expected.subtree_end)  # the tree is the one that was asked for
    targets = batch.logit_index, batch.labels, batch.loss_weights
    return Arm("tree", model_inputs(batch), *targets, batch.mask.visible_pairs(), "tree_attn", "")


def gather_arm(tree: Arm, choice: attention.Choice) -> Arm:
    inputs = {**tree.inputs, "attend": choice.attend}
    del inputs["tree_mask"]
    targets = tree.rows, tree.labels, tree.weights
    return Arm("gather", inputs, *targets, tree.pairs, "segments", choice.name, choice.tried)


def paths_arm(workload: Workload, choice: attention.Choice, device: torch.device) -> Arm:
    ids = torch.tensor([token for sequence in workload.sequences for token in sequence], device=device)
    positions = torch.cat([torch.arange(n) for n in workload.lengths]).to(device)
    flags = torch.tensor([flag for flags in workload.targets for flag in flags], device=device)
    at = flags.nonzero().squeeze(1)  # a root is never a target, so the position before is of the same sequence
    inputs = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False, "attend": choice.attend}
    pairs = sum(n * (n + 1) // 2 for n in workload.lengths)
    weights = torch.ones(len(at), device=device)
    return Arm("paths", inputs, at - 1, ids[at], weights, pairs, "segments", choice.name, choice.tried)


def register() -> None:
    """The attention of the arms without a tree: keyword ``attend`` of the model call."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from tree_attn.integrations import transformers as integration

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, attend: Any, **rest: Any
    ) -> tuple[Tensor, None]:
        assert mask is None
        assert rest["scaling"] == query.shape[-1] ** -0.5  # what all of them take by themselves
        return attend(*(x[0].transpose(0, 1) for x in (query, key, value)))[None], None

    integration.register()
    AttentionInterface.register("segments", forward)
    AttentionMaskInterface.register("segments", lambda *args, **kwargs: None)


def make_model(sizes: dict[str, int], device: torch.device) -> Any:
    """In bfloat16, but for the rotary frequencies."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**sizes, tie_word_embeddings=True, max_position_embeddings=40960, rope_theta=1e6)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, "preserve_rng_state": False})
    return model.train()


# -- a step ----------------------------------------------------------------------------------------------------------


def loss_of(model: Any, arm: Arm, normaliser: float) -> Tensor:
    """The mean of the cross-entropies of all targets of all sequences."""
    model.config._attn_implementation = arm.implementation
    hidden = model.model(**arm.inputs).last_hidden_state[0]  # (tokens, hidden)
    rows = hidden.index_select(0, arm.rows)
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk in zip(rows.split(CHUNK), arm.labels.split(CHUNK), arm.weights.split(CHUNK), strict=True):
        total = total + checkpoint(_summed, model.lm_head.weight, *chunk, use_reentrant=False, preserve_rng_state=False)
    return total / normaliser


def _summed(weight: Tensor, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (cross_entropy(linear(hidden, weight).float(), labels, reduction="none") * weights).sum()


def difference(model: Any, expected: dict[str, Tensor]) -> float:
    """Relative difference of the gradients in the model: the geometric mean over its parameters."""
    logs = []
    for name, parameter in model.named_parameters():
        a, b = parameter.grad.float(), expected[name].to(parameter.device).float()
        logs.append(math.log(max(float((a - b).norm() / b.norm()), 1e-30)))
    return math.exp(sum(logs) / len(logs))


def operations(config: Any, arm: Arm) -> float:
    """Of matrix products in a step: forward, the forward again of the checkpoint, and backward (twice the forward for
    linear layers, two and a half times for attention)."""
    heads, width = config.num_attention_heads * config.head_dim, config.hidden_size
    kv = config.num_key_value_heads * config.head_dim
    layer = 2 * width * (2 * heads + 2 * kv + 3 * config.intermediate_size)
    linear_layers = 4 * config.num_hidden_layers * layer * arm.tokens
    logits = 4 * 2 * width * config.vocab_size * len(arm.rows)
    return linear_layers + logits + config.num_hidden_layers * (2 * 4 + 10) * heads * arm.pairs


# -- measuring -------------------------------------------------------------------------------------------------------


def clock(device: torch.device, run: Callable[[], object]) -> float:
    """Milliseconds of one call, by CUDA events where there are any."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def quick(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Median of three after one that warms up."""

    def milliseconds(run: Callable[[], object]) -> float:
        return median([clock(device, run) for _ in range(4)][1:])

    return milliseconds


def measure(model: Any, optimizer: torch.optim.Optimizer, arm: Arm, normaliser: float) -> dict[str, Any]:
    """Times of steps, peak memory and the loss; the gradients stay in the model."""
    device = arm.rows.device
    losses = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, arm, normaliser)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    if device.type == "cuda":
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    warm = clock(device, step)
    times = [clock(device, step) for _ in range(3 if warm > 1500 else 5)]
    return {
        "step_ms": median(times),
        "all_ms": times,
        "first_ms": warm,
        "loss": float(losses[-1]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "tokens": arm.tokens,
        "logits": len(arm.rows),
        "pairs": arm.pairs,
        "attention": arm.chosen,
        "tried": arm.tried,
        "teraops": operations(model.config, arm) / 1e12,
    }


# -- correctness -----------------------------------------------------------------------------------------------------


def check(model: Any, workload: Workload, ways: dict[str, str], device: torch.device) -> dict[str, Any]:
    """Error of each arm's gradients on three sequences against float32 attention path by path: the geometric mean over
    parameters, and that as a multiple of the error of ``paths``."""
    small = workload.part()
    normaliser = float(sum(map(sum, small.targets)))
    segments, nodes, index = both_segments(small, device)
    tree = tree_arm(small, device)
    control = gather_arm(tree, plain("one by one", attention.packed([tree.tokens], device), None))
    arms = {
        "tree": tree,
        "gather": gather_arm(tree, plain(ways["gather"], nodes, index)),
        "paths": paths_arm(small, plain(ways["paths"], segments, None), device),
        "control": control,
    }
    exact = copy.deepcopy(model).float()
    loss = backward(exact, paths_arm(small, plain("one by one", segments, None), device), normaliser)
    truth = {name: parameter.grad for name, parameter in exact.named_parameters()}
    errors, losses = {}, {}
    for name, arm in arms.items():
        losses[name] = abs(backward(model, arm, normaliser) - loss) / abs(loss)
        errors[name] = difference(model, truth)
    model.zero_grad(set_to_none=True)
    return {
        "gradient_error": errors,
        "loss_error": losses,
        "ratio": {n: e / errors["paths"] for n, e in errors.items()},
    }


def backward(model: Any, arm: Arm, normaliser: float) -> float:
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, arm, normaliser)
    loss.backward()
    return float(loss.detach())


def plain(way: str, segments: attention.Segments, gathered: Tensor | None) -> attention.Choice:
    return attention.Choice(way, segments.run(attention.WAYS[way](segments), gathered), {})


def both_segments(workload: Workload, device: torch.device) -> tuple[attention.Segments, attention.Segments, Tensor]:
    """The segments of the sequences; those of the nodes and their keys' positions."""
    parents, lengths = [p for p, _ in workload.nodes], [n for _, n in workload.nodes]
    return attention.packed(workload.lengths, device), *attention.paths_of_nodes(parents, lengths, device)


def compare(
    model: Any, workload: Workload, options: argparse.Namespace, with_flex: bool, device: torch.device
) -> dict[str, Any]:
    """All arms of one workload."""
    config = model.config
    dtype = next(model.parameters()).dtype
    segments, nodes, index = both_segments(workload, device)
    tree = tree_arm(workload, device)

    def random_qkv(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        sizes = [(tokens, n, config.head_dim) for n in heads]
        q, k, v = (torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes)
        return q, k, v

    def choose(where: attention.Segments, gathered: Tensor | None) -> attention.Choice:
        tensors = random_qkv(sum(where.q_lengths))
        ways = [*options.ways]
        if with_flex and time.perf_counter() - _began < options.seconds / 2:
            ways.append("flex")
        return attention.choose(ways, where, gathered, tensors, quick(device))

    tree.chosen = tree_attn.explain(*random_qkv(tree.tokens), tree.inputs["tree_mask"]).chosen or "none"
    print(f"  tree   attention: backend {tree.chosen}", flush=True)
    gather = gather_arm(tree, choose(nodes, index))
    paths = paths_arm(workload, choose(segments, None), device)
    for arm in (paths, gather):
        tried = ", ".join(f"{n} {t:.2f} ms" if isinstance(t, float) else f"{n}: {t}" for n, t in arm.tried.items())
        print(f"  {arm.name:6s} attention: {arm.chosen}  (a layer, two forwards and a backward: {tried})", flush=True)
    found: dict[str, Any] = {"paths": len(workload.sequences), "useful_tokens": sum(workload.lengths)}
    ways = {"paths": paths.chosen, "gather": gather.chosen}
    ways |= {name: "one by one" for name in ways if ways[name] == "flex"}  # which is compiled for other shapes
    found["check"] = check(model, workload, ways, device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    normaliser = float(sum(map(sum, workload.targets)))
    arms: dict[str, Any] = {}
    reference: dict[str, Tensor] = {}
    for arm in (paths, tree, gather):
        row = arms[arm.name] = measure(model, optimizer, arm, normaliser)
        row["useful_tokens_per_second"] = found["useful_tokens"] / row["step_ms"] * 1e3
        row["teraops_per_second"] = row["teraops"] / row["step_ms"] * 1e3
        if arm is paths:  # on the host, so that it does not count as memory of the next arm
            reference = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
        else:
            row["gradient_difference"] = difference(model, reference)
            row["loss_difference"] = abs(row["loss"] - arms["paths"]["loss"]) / abs(arms["paths"]["loss"])
    found["arms"] = arms
    optimizer.zero_grad(set_to_none=True)
    return found


def judge(found: dict[str, Any], target: float, gather_share: float) -> dict[str, Any]:
    """Ratios, and what of the aims is reached."""
    arms, ratio = found["arms"], found["check"]["ratio"]
    operations_ratio = arms["paths"]["teraops"] / arms["tree"]["teraops"]
    faster = arms["paths"]["step_ms"] / arms["tree"]["step_ms"]
    of_gather = arms["tree"]["step_ms"] / arms["gather"]["step_ms"]
    noise = found["check"]["gradient_error"]["paths"]
    right = {
        "as near to float32 as paths": max(ratio["tree"], ratio["gather"]) < 1.2,
        "the control is not": ratio["control"] > 2,
        "losses agree": max(arms[a]["loss_difference"] for a in ("tree", "gather")) < 5e-4,
        # Two roundings of about that size each; the sums over more tokens and chunks add some.
        "gradients agree": max(arms[a]["gradient_difference"] for a in ("tree", "gather")) < 3 * noise,
    }
    return {
        "ratio_of_operations": operations_ratio,
        "faster_than_paths": faster,
        "share_of_ratio": faster / operations_ratio,
        "time_of_gather": of_gather,
        "right": right,
        "reached": {
            f"{target} times as fast as paths": faster >= target,
            f"{SHARE:.0%} of the ratio of operations": faster >= SHARE * operations_ratio,
            f"at most {gather_share} of gather's time": of_gather <= gather_share,
        },
    }


def report(found: dict[str, Any]) -> None:
    for name in ARMS:
        row = found["arms"][name]
        memory = "" if row["peak_gib"] is None else f"  peak {row['peak_gib']:5.1f} GiB"
        apart = f"  gradients {row['gradient_difference']:.1e} from paths" if name != "paths" else ""
        print(
            f"  {name:6s} {row['step_ms']:9.1f} ms  {row['useful_tokens_per_second']:9.0f} useful tokens/s{memory}  "
            f"{row['tokens']} tokens, {row['logits']} rows of logits, {row['teraops_per_second']:.0f} TFLOP/s, "
            f"loss {row['loss']:.6f}{apart}"
        )
    checked = found["check"]["gradient_error"]
    print("  three sequences, error against float32: " + ", ".join(f"{n} {e:.2e}" for n, e in checked.items()))
    print(
        f"  {found['faster_than_paths']:.2f} times as fast as paths; operations {found['ratio_of_operations']:.2f} "
        f"times fewer, {found['share_of_ratio']:.0%} of that reached; {found['time_of_gather']:.2f} of gather's time"
    )
    for kind in ("right", "reached"):
        print(f"  {kind}: " + ", ".join(f"{what} {'yes' if is_so else 'NO'}" for what, is_so in found[kind].items()))
    print(f"  [{time.perf_counter() - _began:.0f} s]", flush=True)


def machine() -> dict[str, Any]:
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "tree_attn": tree_attn.__version__,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every workload in turn; the file is written after each."""
    register()
    tiny = options.tiny
    device = torch.device("cpu" if tiny else "cuda")
    if tiny:
        torch.set_num_threads(1)  # tensors so small lose time by more
    options.ways = ["one by one"] if tiny else options.ways.split(",")
    options.flex = "" if tiny else options.flex
    model = make_model(TINY if tiny else MODEL, device)
    result: dict[str, Any] = {**machine(), "tiny": tiny, "model": TINY if tiny else MODEL, "workloads": {}}
    print(json.dumps(result), flush=True)
    for letter in options.workloads.split(","):
        tree, what, target, gather_share = CASES[letter]
        nodes = [(parent, max(1, n // SMALLER) if tiny else n) for parent, n in WORKLOADS[tree]()]
        print(f"({letter}) {tree}: {what}" + (f", lengths divided by {SMALLER}" if tiny else ""), flush=True)
        try:
            found = compare(
                model, make_workload(tree, nodes, model.config.vocab_size), options, letter in options.flex, device
            )
        except torch.OutOfMemoryError as problem:  # the other workloads are still worth their time
            result["workloads"][letter] = {"workload": tree, "why_not": str(problem)}
            print(f"  {problem}", flush=True)
            continue
        found |= {"workload": tree, "what": what, **judge(found, target, gather_share)}
        result["workloads"][letter] = found
        report(found)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| workload | arm | step | useful tokens/s | peak memory | attention | against paths |",
        "| --- | --- | --: | --: | --: | --- | --: |",
    ]
    for letter, found in result["workloads"].items():
        for name in ARMS if "arms" in found else ():
            row = found["arms"][name]
            memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} GiB"
            ratio = found["arms"]["paths"]["step_ms"] / row["step_ms"]
            of_operations = f" (operations {found['ratio_of_operations']:.2f}x)" if name == "tree" else ""
            cells = [f"({letter}) {found['what']}" if name == ARMS[0] else "", name, f"{row['step_ms']:,.0f} ms"]
            cells += [
                f"{row['useful_tokens_per_second']:,.0f}",
                memory,
                row["attention"],
                f"{ratio:.2f}x{of_operations}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], out: Path) -> None:
    """Useful tokens a second of every arm, and where the ratio of operations would put the tree."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    workloads = {k: w for k, w in result["workloads"].items() if "arms" in w}
    figure, axes = plt.subplots(1, len(workloads), figsize=(3.4 * len(workloads), 3.6), layout="constrained")
    colours = {"paths": "tab:orange", "gather": "tab:gray", "tree": "tab:blue"}
    for axis, found in zip(axes if len(workloads) > 1 else [axes], workloads.values(), strict=True):
        speeds = {name: found["arms"][name]["useful_tokens_per_second"] / 1e3 for name in colours}
        bars = axis.bar(list(colours), speeds.values(), color=list(colours.values()))
        axis.bar_label(bars, [f"{speed / speeds['paths']:.2f}x" for speed in speeds.values()])
        axis.axhline(speeds["paths"] * found["ratio_of_operations"], color="black", linestyle="--", linewidth=1)
        axis.set(title=found["what"], ylabel="thousand useful tokens a second")
        axis.title.set_fontsize(9)
        axis.margins(y=0.15)
    figure.suptitle("one optimiser step; dashed: what the saved operations alone would give", fontsize=9)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time an optimiser step on trees, on sequences and with gathered keys."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--workloads", default="a,c,b", help="letters of " + ", ".join(CASES))
    runs.add_argument("--ways", default=WAYS, help="attention to choose from")
    runs.add_argument("--flex", default="b", help="workloads for which flex_attention is tried too: slow to compile")
    runs.add_argument("--json", type=Path, help="also write the results here, after every workload")
    runs.add_argument("--tiny", action="store_true", help="a small model and short sequences on the CPU")
    runs.add_argument("--seconds", type=float, default=150, help="no flex_attention when less than half is left")
    plots = commands.add_parser("plot", help="draw the results of a run, and print them as a table")
    plots.add_argument("file", type=Path)
    plots.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.command == "plot":
        result = json.loads(options.file.read_text())
        plot(result, options.out)
        print(table(result))
        return
    result = run(options)
    right = [all(w.get("right", {"ran": False}).values()) for w in result["workloads"].values()]
    if not all(right):
        raise SystemExit("the arms do NOT compute the same")


if __name__ == "__main__":
    main()
