"""`guerdon optimise-noise MODEL --prompt TEXT --reward REWARD`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guerdon.cli.parser import Parser
from guerdon.errors import RecipeError, nearest

_DESCRIPTION = """\
Optimise the initial noise of pictures for rewards (ReNO), with the model's weights as they are.

  guerdon optimise-noise ./sd-turbo --prompt "a red cube" --reward my:score --reward my:other --weight 5 --weight 1
  guerdon optimise-noise runs/NAME --prompt "a red circle" --steps 2
  guerdon optimise-noise shapes/full --prompt "a red circle" \\
    --reward '{"guerdon.diffusion.oracle:oracle_likeness": {task: shapes}}'

MODEL is a pipeline's folder, a run, a bundled base, or a name on the hub. A reward is a component as in a recipe; it names
`images`, a tensor [N, C, H, W] in [0, 1], and gives a tensor [N] with its gradient. It may also name `prompts` and columns
of the data. A run brings its own rewards and the columns of its data.
"""


def run(words: Sequence[str]) -> int:
    """Read the options, search, and write pictures and the search's course."""
    args = _parser().parse_args(list(words))
    if not args.prompt:
        raise RecipeError("optimise-noise: at least one --prompt is needed.")
    if len(args.weight) not in (0, len(args.reward)):
        raise RecipeError(
            f"optimise-noise: give as many --weight as --reward, in the same order; got {len(args.weight)} for "
            f"{len(args.reward)}."
        )
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise RecipeError(f"optimise-noise: {args.out} is there already and is not empty. Choose another --out.")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # so that a reward can be module:attribute of a file here
    _search(args)
    return 0


def _parser() -> Parser:
    parser = Parser("optimise-noise", _DESCRIPTION)
    parser.add_argument(
        "model", metavar="MODEL", help="a pipeline's folder, runs/NAME, a bundled base, or a name on the hub"
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--reward", action="append", default=[], metavar="REWARD", help="may be given several times")
    parser.add_argument("--weight", action="append", default=[], type=float, metavar="W", help="of each reward [1]")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the prompts' row, for rewards that name it",
    )
    parser.add_argument("--steps", type=_count, default=1, help="denoising steps of the generator [1]")
    parser.add_argument("--guidance", type=float, help="scale of guidance; by default 1, or the run's")
    parser.add_argument("--samples", type=_count, default=1, help="pictures per prompt [1]")
    parser.add_argument("--iterations", type=_count, default=50, help="pictures looked at, per picture [50]")
    parser.add_argument("--lr", type=float, default=5.0, help="learning rate [5]")
    parser.add_argument("--momentum", type=float, default=0.9, help="of sgd [0.9]")
    parser.add_argument("--grad-clip", type=float, default=0.1, help="largest gradient norm of a picture [0.1]")
    parser.add_argument("--norm-weight", type=float, default=0.01, help="of the penalty on the noise's norm [0.01]")
    parser.add_argument("--optimiser", choices=("sgd", "adam", "lbfgs"), default="sgd", help="[sgd]")
    parser.add_argument("--refine", type=_count, metavar="N", help="also draw the best noise with N denoising steps")
    parser.add_argument("--batch", type=_count, default=8, help="pictures worked on at once; bounds memory alone [8]")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights [float32]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first noise [0]")
    parser.add_argument("--out", type=Path, default=Path("noise"), metavar="DIR", help="folder to write [noise]")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _search(args: argparse.Namespace) -> None:
    import torch

    from guerdon.diffusion.pathwise import first_noise, generator_of
    from guerdon.inference import optimise_noise
    from guerdon.training.loop import mix_seed

    policy, specs, rows = _load(args)
    rewards = _rewards(args.reward or specs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy.to(device).requires_grad_(False)
    prompts = [prompt for prompt in args.prompt for _ in range(args.samples)]
    seeds = [mix_seed(args.seed, i) for i in range(len(prompts))]
    columns = _columns(args, prompts, rows)
    weights = dict(zip(rewards, args.weight, strict=True)) if args.weight else None
    args.out.mkdir(parents=True, exist_ok=True)
    size = 1 if args.optimiser == "lbfgs" else args.batch
    records, kept = [], []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        generate = generator_of(policy, prompts[part], steps=args.steps)
        found = optimise_noise(
            generate,
            first_noise(policy, seeds[part]),
            {n: _bound(r, n, prompts[part], {c: v[part] for c, v in columns.items()}) for n, r in rewards.items()},
            weights=weights,
            iterations=args.iterations,
            lr=args.lr,
            momentum=args.momentum,
            grad_clip=args.grad_clip,
            norm_weight=args.norm_weight,
            optimiser=args.optimiser,
        )
        pictures = {"before": found.initial, "best": found.images}
        if args.refine:
            with torch.no_grad():
                pictures["refined"] = generator_of(policy, prompts[part], steps=args.refine)(found.noise)
        kept.append(found.noise.float().cpu())
        for n in range(len(found.noise)):
            records.append(_record(args.out, start + n, n, prompts[start + n], seeds[start + n], found, pictures))
            _say(records[-1])
    from safetensors.torch import save_file

    save_file({"noise": torch.cat(kept)}, args.out / "noise.safetensors")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    course = {"settings": settings, "rewards": list(rewards), "weights": weights, "samples": records}
    (args.out / "trajectory.json").write_text(json.dumps(course, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(args.out / "trajectory.json")


def _load(args: argparse.Namespace) -> tuple[Any, list[Any], Sequence[Mapping[str, Any]]]:
    """The policy, the rewards that come with it, and rows in which a prompt's columns may be found."""
    from guerdon.diffusion.bases import BASES, base, bundled_models
    from guerdon.diffusion.policy import DenoisingPolicy
    from guerdon.diffusion.tasks import TASKS, find

    folder = Path(args.model)
    options: dict[str, Any] = {"steps": args.steps, "dtype": args.dtype}
    if args.guidance is not None:
        options["guidance"] = args.guidance
    if (folder / "recipe.yaml").is_file():
        return _of_run(folder, options)
    if args.model in BASES:
        return base(args.model, **options), [], find(BASES[args.model].task).prompt_rows()
    if not folder.exists() and args.model.partition("/")[0] in TASKS:
        known = [name for name in bundled_models() if name in BASES]
        raise RecipeError(
            f"optimise-noise: there is no base {args.model!r}.{nearest(args.model, known)} There are: {', '.join(known)}."
        )
    return DenoisingPolicy.load(args.model, **options), [], []


def _of_run(folder: Path, options: dict[str, Any]) -> tuple[Any, list[Any], Sequence[Mapping[str, Any]]]:
    from dataclasses import replace

    from guerdon.diffusion import domain
    from guerdon.recipes.schema import load_recipe
    from guerdon.training import checkpoint

    recipe = load_recipe(folder / "recipe.yaml")
    if recipe.policy.kind == "language" or recipe.data is None:
        raise RecipeError(f"optimise-noise: {folder} trained a language model; noise is what images are drawn from.")
    settings = replace(recipe.policy, **options)
    start = folder / "base"
    policy = domain.build_policy(settings, base=start if start.exists() else None, seed=recipe.seed)
    domain.add_adapters(policy, settings)
    found, _ = checkpoint.read(folder)
    average = found / "average"
    policy.load_weights(average if average.is_dir() else found / "policy")
    rows = domain.load_data(recipe.data, loop=recipe.loop, evaluation=recipe.evaluation, seed=recipe.seed)
    specs = [] if recipe.loop == "supervised" else list(recipe.rewards.values())
    return policy, specs, [] if recipe.loop == "supervised" else rows.train


def _rewards(specs: Sequence[Any]) -> dict[str, Any]:
    """Name -> reward, each checked to name `images`."""
    from guerdon.components import build
    from guerdon.recipes.yaml12 import loads
    from guerdon.stages import label, signature

    if not specs:
        raise RecipeError("optimise-noise: at least one --reward is needed, such as --reward myrewards:score.")
    found: dict[str, Any] = {}
    for spec in specs:
        reward = build("rewards", loads(spec) if isinstance(spec, str) else spec, "--reward")
        if "images" not in signature(reward).fields:
            raise RecipeError(
                f"optimise-noise: the reward {label(reward)} does not name `images`, the tensor to differentiate by; it "
                f"names {', '.join(signature(reward).fields) or 'nothing'}."
            )
        name = label(reward).split(".")[-1]
        found[name if name not in found else f"{name}_{len(found) + 1}"] = reward
    return found


def _columns(
    args: argparse.Namespace, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """What the data says of each prompt, and what was given on the command line."""
    from guerdon.recipes.yaml12 import loads

    known = {str(row["prompt"]): row for row in rows} if rows else {}
    found = [dict(known.get(prompt, {})) for prompt in prompts]
    for text in args.column:
        name, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"optimise-noise: --column is given as NAME=VALUE; got {text!r}.")
        for row in found:
            row[name] = loads(value)
    shared = set.intersection(*(set(row) for row in found)) - {"prompt"} if found else set()
    return {name: [row[name] for row in found] for name in sorted(shared)}


def _bound(reward: Any, name: str, prompts: list[str], columns: dict[str, list[Any]]) -> Any:
    """A reward as a function of images alone."""
    from guerdon.stages import call

    return lambda images: call(reward, {**columns, "prompts": prompts, "images": images}, f"reward {name!r}")


def _record(
    out: Path, number: int, n: int, prompt: str, seed: int, found: Any, pictures: Mapping[str, Any]
) -> dict[str, Any]:
    """One picture's course as plain values; its images are written."""
    from guerdon.training.images import write_image

    for kind, images in pictures.items():
        write_image(out, f"{kind}-{number}", images[n])
    best = int(found.best[n])

    def scores(iteration: int) -> dict[str, float | None]:
        return {name: _plain(found.scores[iteration, n, k].item()) for k, name in enumerate(found.names)}

    return {
        "prompt": prompt,
        "seed": seed,
        "images": {kind: f"{kind}-{number}.png" for kind in pictures},
        "best_iteration": best,
        "stopped": bool(found.stopped[n]),
        "before": scores(0),
        "best": scores(best),
        "loss": [_plain(value) for value in found.loss[:, n].tolist()],
        "norm": [_plain(value) for value in found.norm[:, n].tolist()],
        "scores": {name: [_plain(v) for v in found.scores[:, n, k].tolist()] for k, name in enumerate(found.names)},
    }


def _plain(value: float) -> float | None:
    return round(value, 6) if value == value and abs(value) != float("inf") else None


def _say(record: Mapping[str, Any]) -> None:
    scores = ", ".join(
        f"{name} {_shown(before)} -> {_shown(record['best'][name])}" for name, before in record["before"].items()
    )
    ended = "; stopped: a loss was not finite" if record["stopped"] else ""
    print(
        f"{record['images']['best']}  {record['prompt']!r:.60}  {scores}  (iteration {record['best_iteration']}{ended})"
    )


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
