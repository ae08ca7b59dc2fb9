"""The kernels' speed on tree workloads beside their peers, from one run on one GPU: ``tree-attn bench`` without extras.

    python ci/gpu_bench.py [--peers portable,hopper,flex,sdpa,fa2] [--workloads grpo4k_16x1k,...] [--json FILE]

A line for each measurement as it ends. What is measured, and how, is said in tree_attn/cli/bench.py; the peers are
those of tree_attn/cli/peers.py. ``tree-attn bench --from FILE -o plot.png`` draws the plot.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from tree_attn.cli import bench
from tree_attn.cli.workloads import WORKLOADS

PEERS = ("portable", "hopper", "fa2", "flex", "sdpa")


def show(row: bench.Row) -> None:
    if row.why_not:
        said = row.why_not
    else:
        said = (
            f"forward {row.forward_ms:8.3f} ms {row.forward_tflops:4.0f} TFLOP/s"
            f"  backward {row.backward_ms:8.3f} ms {row.backward_tflops:4.0f} TFLOP/s  error {row.error:.1e}"
        )
    print(f"{row.workload:18s} {row.peer:9s} {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the kernels on tree workloads.")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--heads", default="32,8,128", help="query heads, key/value heads, head dim")
    parser.add_argument("--runs", type=int, default=1, help="measure everything this often; medians count")
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    heads, kv_heads, head_dim = (int(n) for n in given.heads.split(","))
    setup = replace(bench.Setup.of_device("cuda"), heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    results = bench.measure(given.workloads.split(","), given.peers.split(","), setup, given.runs, on_row=show)
    print(f"{results.machine}, torch {results.torch}, matrix product {results.matmul_tflops:.0f} TFLOP/s")
    if given.json:
        given.json.write_text(results.to_json())


if __name__ == "__main__":
    main()
