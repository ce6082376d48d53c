"""Kills a training run with SIGKILL again and again, resumes it, and compares the final weights.

Every other kill comes at a random moment of the command's life; the others while a checkpoint is
being written, moved or removed. The kills' moments come from a seed, but what the run is doing
then depends on the machine. At the end the weights must be those of a run that was never killed,
bit by bit. A row goes into results/kills.jsonl.

Each life of a run is `velora train` in a process of its own, forked from one that has imported
everything: imports take most of a short life, and write nothing.

    python benchmarks/kills.py                # 50 kills: about ten minutes on 2 cores
    python benchmarks/kills.py --kills 3      # what the tests do
    python benchmarks/kills.py --processes 2 --strategy fsdp2     # all but one die a moment later
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import velora_torch.training.trainer  # noqa: F401  the forks find it imported
from velora_torch import cli
from velora_torch.report.environment import machine_info, version_info
from velora_torch.training.manifest import damage
from velora_torch.training.staging import STAGING, checkpoints

ROWS = Path(__file__).parent / "results" / "kills.jsonl"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TEXT = "The cat sees the house again. A dog likes a gradient under a bridge. Nobody forgets {n}."


def prepare(folder: Path, output: str, steps: int, shards: bool) -> Path:
    """Write a model's configuration, a text and a recipe; the recipe's path."""
    (folder / "model.json").write_text(json.dumps(CONFIG))
    rows = (json.dumps({"text": TEXT.format(n=n)}) + "\n" for n in range(400))
    (folder / "text.jsonl").write_text("".join(rows))
    recipe = {
        "task": "pretrain",
        "model": str(folder / "model.json"),
        "dtype": "float32",
        "velora": {"sub_token_size": 4, "refresh_every": 3},
        "tokenizer": {"vocab_size": 360},
        "data": {"train": str(folder / "text.jsonl"), "max_length": 16, "eval_fraction": 0.1},
        "train": {
            "output": str(folder / output),
            "steps": steps,
            "batch_size": 2,
            "accumulation": 2,
            "learning_rate": 1e-2,
            "save_every": 1,
            "shard_checkpoints": shards,
            "log_every": 10,
            "tensorboard": False,
        },
        "evaluate": {"before": False, "after": False},
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Life:
    """Processes that run `velora train` together, with nothing to show but their errors."""

    def __init__(self, count: int, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": port}
        self._running = [
            _start({**shared, "RANK": str(rank)} if count > 1 else {}, *arguments)
            for rank in range(count)
        ]
        self._codes: list[int] = []

    def code(self) -> int | None:
        """0 once all have ended well, what the first that did not has left, None while they run."""
        for process in list(self._running):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                self._end(process, status)
        bad = next((code for code in self._codes if code), None)
        return bad if bad is not None or self._running else 0

    def wait(self) -> int:
        """The same when all have ended."""
        for process in list(self._running):
            self._end(process, os.waitpid(process, 0)[1])
        return self.code() or 0

    def kill(self, draw: random.Random) -> int:
        """Kill one, as when its machine goes, and a moment later those that are left."""
        for number, process in enumerate(draw.sample(self._running, len(self._running))):
            if number == 1:
                time.sleep(draw.uniform(0, 0.5))
            os.kill(process, signal.SIGKILL)
            if number == 0:
                self._end(process, os.waitpid(process, 0)[1])
        return self.wait()

    def _end(self, process: int, status: int) -> None:
        self._running.remove(process)
        self._codes.append(os.waitstatus_to_exitcode(status))


def _start(place: dict[str, str], *arguments: str) -> int:
    child = os.fork()
    if child:
        return child
    if place:
        os.environ |= {**place, "LOCAL_RANK": place["RANK"], "MASTER_ADDR": "localhost"}
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.argv = ["velora", "train", *arguments]
    try:
        cli.main()
    except SystemExit as done:
        os._exit(done.code if isinstance(done.code, int) else 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


Begin = Callable[..., Life]
"""Starts a run with options of `velora train`."""


class Killer:
    """Starts a run, ends it, and looks at what it has left."""

    def __init__(self, begin: Begin, output: Path, draw: random.Random) -> None:
        self._begin, self._output, self._draw = begin, output, draw
        self._life = 5.0
        """Seconds until a run that goes on has written its first checkpoint."""
        self.kills = 0
        self.while_saving = 0
        """Kills that left a half-written checkpoint or removal behind."""
        self.without_checkpoint = 0
        """Kills after which there was none yet."""
        self.finished = False

    def live(self, aimed: bool) -> None:
        """Start or resume the run, and kill it."""
        known = bool(checkpoints(self._output))
        begun, before = time.monotonic(), self._newest()
        life = self._begin("--resume" if known else "--overwrite")
        code: int | None = None
        if aimed:
            code = self._wait_for_saves(life, before, begun)
        else:
            time.sleep(self._draw.uniform(0, self._life * 1.5))
        if code is None and (code := life.code()) is None:
            code = life.kill(self._draw)
        if code == 0:
            self.finished = True
            return
        if code != -signal.SIGKILL:
            raise RuntimeError(f"exit {code}")
        self.kills += 1
        self._look(known)

    def _newest(self) -> Path | None:
        return next(iter(checkpoints(self._output)), None)

    def _wait_for_saves(self, life: Life, before: Path | None, begun: float) -> int | None:
        """Wait until some checkpoints were written and another one is being written."""
        for wait in range(self._draw.randint(1, 3)):
            while self._newest() == before:
                if (code := life.code()) is not None:
                    return code
                time.sleep(0.001)
            before = self._newest()
            if wait == 0:
                self._life = time.monotonic() - begun
        while not (self._output / STAGING).exists():
            if (code := life.code()) is not None:
                return code
            time.sleep(0.0002)
        time.sleep(self._draw.uniform(0, 0.02))
        return None

    def _look(self, known: bool) -> None:
        self.while_saving += (self._output / STAGING).exists()
        there = checkpoints(self._output)
        wrong = [f"{path.name}: {found}" for path in there if (found := damage(path))]
        if wrong:
            raise RuntimeError(f"after kill {self.kills}: {'; '.join(wrong)}")
        if known and not there:
            raise RuntimeError(f"after kill {self.kills}: all checkpoints are gone")
        self.without_checkpoint += not there


def final_weights(output: Path) -> bytes:
    """The final model's weights."""
    return (output / "final" / "model.safetensors").read_bytes()


def finish(begin: Begin, output: Path) -> None:
    """Run or resume to the end."""
    code = begin(*(["--resume"] if checkpoints(output) else [])).wait()
    if code:
        raise RuntimeError(f"exit {code}")


def measure(
    kills: int, seed: int, steps: int, processes: int, strategy: str, folder: Path
) -> dict[str, Any]:
    """Kill runs of a recipe until there were so many kills; the row."""
    draw, begun = random.Random(seed), time.monotonic()

    def beginning(output: str) -> Begin:
        recipe = prepare(folder, output, steps, shards=strategy == "fsdp2")
        return partial(Life, processes, str(recipe), "--strategy", strategy)

    finish(beginning("whole"), folder / "whole")
    expected = final_weights(folder / "whole")
    done = saving = without = runs = 0
    while done < kills:
        output = f"killed-{runs}"
        begin = beginning(output)
        killer = Killer(begin, folder / output, draw)
        runs += 1
        while not killer.finished and done + killer.kills < kills:
            killer.live(aimed=killer.kills % 2 == 0)
            print(f"{done + killer.kills} kills, run {runs}, {killer._newest()}", flush=True)
        if not killer.finished:
            finish(begin, folder / output)
        if final_weights(folder / output) != expected:
            raise RuntimeError(f"{output}: the final weights differ from the uninterrupted run's")
        done += killer.kills
        saving += killer.while_saving
        without += killer.without_checkpoint
    return {
        "benchmark": "kills",
        "kills": done,
        "processes": processes,
        "strategy": strategy,
        "while_saving": saving,
        "before_the_first_checkpoint": without,
        "runs": runs,
        "steps": steps,
        "seed": seed,
        "bitwise_equal": True,
        "seconds": round(time.monotonic() - begun),
    }


def main() -> None:
    """Kill, compare, and add a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run")
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    parser.add_argument("--strategy", default="ddp", help="fsdp2 also writes checkpoints in shards")
    parser.add_argument("--no-row", action="store_true", help="only print the row")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VELORA_CACHE"] = folder  # trained vocabularies
        row = measure(
            given.kills, given.seed, given.steps, given.processes, given.strategy, Path(folder)
        )
    row |= {
        "command": shlex.join(["python", "benchmarks/kills.py", *sys.argv[1:]]),
        "machine": vars(machine_info()),
        "versions": version_info(),
    }
    if not given.no_row:
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
