"""ldmkit beside its peers: the same networks, batches and data, in turns in one process.

    python bench/compare.py ae-train decode --rounds 9 --json beside.json
    python bench/compare.py sample --processes 3
    python bench/compare.py all --memory --json beside.json
    python bench/compare.py --read beside.json --markdown

Each case of a workload runs once in each round, the rounds beginning with another case each time. A ratio is the
median over the rounds of diffusers' time / this time. Timings in which others used more than 0.15 of the cores
that the threads want are marked, and left out where three or more remain. A share of the peak is model FLOPs
(the reference's, whatever a case saves) over the best matrix product or convolution of the same run, in the
same number format, with as many threads. Needs the extra `bench`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import tables
from measuring import Options, alone, measure, pooled, with_memory
from workloads import WORKLOADS, Workload

Titled = tuple[str, str, tables.Run]


def workload_of(name: str, asked: argparse.Namespace) -> Workload:
    """A workload by name, of another side or batch if these are asked for."""
    known = WORKLOADS[name]
    return known._replace(side=asked.size or known.side, batch=asked.batch or known.batch)


def title_of(name: str, workload: Workload) -> str:
    """Name, size and batch."""
    unit = "latents" if workload.second_stage else "px"
    return f"{name}, {workload.side}x{workload.side} {unit}, batch {workload.batch}"


def compared(name: str, asked: argparse.Namespace) -> Titled:
    """Measure a workload, in as many fresh processes as asked for."""
    workload = workload_of(name, asked)
    options = Options(
        cases=tuple(asked.cases),
        rounds=asked.rounds,
        threads=asked.threads,
        device=asked.device,
        quiet=asked.quiet,
    )
    runs = [alone(measure, name, workload, options, say) for _ in range(asked.processes)]
    run = pooled(runs)
    if asked.memory:
        run = with_memory(run, workload, options)
    return title_of(name, workload), workload.kind, run


def say(line: str) -> None:
    """Talk, so that standard output has the result alone."""
    print(line, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The options."""
    described = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = described.add_argument
    add("workloads", nargs="*", metavar="WORKLOAD", help=f"all, or of: {', '.join(WORKLOADS)}")
    add("--rounds", type=int, default=7, help="in each process (7)")
    add("--threads", type=int, default=2, help="of each process (2)")
    add("--processes", type=int, default=1, help="fresh ones one after the other, pooled (1)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--cases", nargs="+", default=[], help="PEER:SETTING, ldmkit, ldmkit:fp32 (default: all)")
    add("--size", type=int, help="side of pictures or latents instead of the workload's")
    add("--batch", type=int, help="instead of the workload's")
    add("--quiet", type=float, default=0.0, help="seconds to wait for others before a timing (0)")
    add("--memory", action="store_true", help="peak memory too, of each case in its own process")
    add("--json", type=Path, help="file for everything, down to each timing")
    add("--read", type=Path, nargs="+", default=[], help="files of --json to show, not measure")
    add("--markdown", action="store_true", help="tables for docs/performance.md")
    return described


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    asked = parser().parse_args(arguments)
    names = list(WORKLOADS) if asked.workloads == ["all"] else asked.workloads
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown or not (names or asked.read):
        parser().error(f"name one or more of: all, {', '.join(WORKLOADS)}")
    found: list[Titled] = []
    for file in asked.read:
        found += tables.read_document(json.loads(file.read_text()))
    for name in names:
        found.append(compared(name, asked))
        if asked.json:  # after each, so that hours are not lost to the last
            asked.json.write_text(json.dumps(tables.document(found), indent=1) + "\n")
    show = tables.markdown if asked.markdown else tables.text
    print("\n\n".join(show(*one) for one in found))


if __name__ == "__main__":
    main()
