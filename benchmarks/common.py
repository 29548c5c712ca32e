"""What both sides of a benchmark share: the same model, words, prompts and reward, clocks and a memory meter.

Nothing is downloaded: weights are random, the tokenizer is an alphabet. It runs in guerdon's environment and the
peers'. Clocks and memory are read from /proc, so it needs Linux. On a GPU every clock waits for the device first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SPECIAL = ("<pad>", "<bos>", "<eos>")
PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
# blocks of characters for larger vocabularies: common ideographs, then what Unicode leaves to private use
MANY = (range(0x4E00, 0xA000), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
PACKAGES = ("guerdon", "torch", "transformers", "accelerate", "trl", "datasets", "tokenizers", "triton")


@dataclass(frozen=True)
class ModelShape:
    """A Llama with random weights, and where it is."""

    vocabulary: int = 64
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 4
    mlp: int = 512
    tied: bool = False
    positions: int = 256
    device: str = field(default="cpu", metadata={"choices": ["cpu", "cuda"]})
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16"]})
    seed: int = 0


def settings(kind: type, description: str | None) -> Any:
    """An instance of the dataclass `kind` from the command line, and where to write the figures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for setting in fields(kind):
        flag = f"--{setting.name.replace('_', '-')}"
        choices = setting.metadata.get("choices")
        if setting.default is MISSING:
            parser.add_argument(flag, required=True, choices=choices)
        elif isinstance(setting.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=setting.default)
        else:
            parser.add_argument(flag, type=type(setting.default), default=setting.default, choices=choices)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    found = vars(parser.parse_args())
    target = found.pop("json")
    return kind(**found), target


def quiet() -> None:
    """No network, no second thread, no banners; call before torch is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def letters(vocabulary: int) -> list[str]:
    """One character for every id that is not special."""
    count = vocabulary - len(SPECIAL)
    return [*PLAIN, *map(chr, itertools.chain(*MANY))][:count]


def tokenizer(vocabulary: int) -> Any:
    """A fast tokenizer with one id per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate([*SPECIAL, *letters(vocabulary)])}
    core = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[0]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left"
    )


def llama(shape: ModelShape) -> Any:
    """The model; the same shape and seed give the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(shape.seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(getattr(torch, shape.dtype))


def fingerprint(model: Any) -> dict[str, float]:
    """Enough to see that both sides start from the same weights."""
    weights = [p.detach().double() for p in model.parameters()]
    return {
        "parameters": sum(w.numel() for w in weights),
        "sum_of_squares": sum(w.square().sum().item() for w in weights),
    }


def prompts(count: int, length: int, vocabulary: int, seed: int) -> list[str]:
    """Random words over the alphabet."""
    draw = random.Random(seed)
    return ["".join(draw.choices(letters(vocabulary), k=length)) for _ in range(count)]


class Hits:
    """A reward function in the form TRL calls: the share of characters from the first eighth of the alphabet."""

    __name__ = "hits"

    def __init__(self, vocabulary: int) -> None:
        alphabet = letters(vocabulary)
        self.wanted = set(alphabet[: len(alphabet) // 8])

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [sum(c in self.wanted for c in text) / max(len(text), 1) for text in completions]


class Laps:
    """CPU and wall seconds from lap to lap."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.start()

    def start(self) -> None:
        self.at = time.process_time(), time.perf_counter()

    def lap(self) -> None:
        wait_for_device()
        now = time.process_time(), time.perf_counter()
        self.cpu.append(now[0] - self.at[0])
        self.wall.append(now[1] - self.at[1])
        self.at = now

    def figures(self, warmup: int) -> dict[str, dict[str, float]]:
        return {"cpu_s": summary(self.cpu[warmup:]), "wall_s": summary(self.wall[warmup:])}


class Phases:
    """CPU seconds (on a GPU: wall seconds) by phase: methods are wrapped on the object they belong to."""

    def __init__(self, device: str = "cpu") -> None:
        self.clock = time.process_time if device == "cpu" else _device_clock
        self.spent: dict[str, float] = {}
        self.running = False

    def wrap(self, owner: Any, name: str, label: Any) -> None:
        """Time `owner.name`; `label` is a name, or a function from the call's arguments to one."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            try:
                return inner(*args, **kwargs)
            finally:
                if self.running:
                    phase = label(*args, **kwargs) if callable(label) else label
                    self.spent[phase] = self.spent.get(phase, 0.0) + self.clock() - start

        setattr(owner, name, timed)

    def per(self, steps: int) -> dict[str, float]:
        return {phase: seconds / steps for phase, seconds in self.spent.items()}


def wait_for_device() -> None:
    """Return when the GPU, if there is one in use, has done all it was given."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _device_clock() -> float:
    wait_for_device()
    return time.perf_counter()


def device_memory() -> dict[str, Any]:
    """The most memory of the GPU that was in use, in MiB, and which GPU it is; nothing without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    peak = torch.cuda.max_memory_allocated() / 2**20
    return {"device_peak_mib": peak, "device": torch.cuda.get_device_name()}


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "median": statistics.median(ordered),
        "least": ordered[0],
        "mean": statistics.fmean(ordered),
        "most": ordered[-1],
    }


def since_start() -> dict[str, float]:
    """Seconds since this process began, the interpreter's own start included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return {"cpu_s": time.process_time(), "wall_s": uptime - ticks / os.sysconf("SC_CLK_TCK")}


def memory_mib(kind: str = "VmRSS") -> float:
    """Resident memory now, or its peak (`VmHWM`), which unlike getrusage's does not inherit the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


def machine() -> dict[str, Any]:
    """Where the figures were taken."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(
        (line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.processor()
    )
    total = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "memory_gib": round(total, 1),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def report(work: Any, figures: dict[str, Any], target: Path | None) -> None:
    """Print the figures with their settings as JSON, and write them."""
    record = {"settings": asdict(work), "versions": versions(), "load_average": os.getloadavg()[0], **figures}
    text = json.dumps(record, indent=1)
    print(text)
    if target is not None:
        target.write_text(text + "\n")


def measure_or_tabulate(
    work: type,
    description: str | None,
    measure: Callable[[Any], dict[str, Any]],
    run_all: Callable[[], None],
    table: Callable[[], str],
    page: Path,
    markers: tuple[str, str],
    title: str,
) -> None:
    """The command of a benchmark with a section of its own: `--one` measures, `--table` only writes the section again."""
    quiet()
    if "--one" in sys.argv:
        sys.argv.remove("--one")
        given, target = settings(work, description)
        report(given, measure(given), target)
        return
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table again")
    if not parser.parse_args().table:
        run_all()
    text = table()
    print(text)
    write_section(page, markers, title, text)


def write_section(page: Path, markers: tuple[str, str], title: str, text: str) -> None:
    """Put `text` between the markers of a page; a page without them gets a section at its end."""
    begin, end = markers
    old = page.read_text(encoding="utf-8")
    if begin not in old:
        old = f"{old.rstrip()}\n\n## {title}\n\n{begin}\n{end}\n"
    head, _, rest = old.partition(begin)
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")
