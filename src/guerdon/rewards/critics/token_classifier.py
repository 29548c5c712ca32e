"""A token classifier of transformers as a model of feedback: for each token of a response, good, poor or neither."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from guerdon.errors import CheckpointError, DataError, RecipeError, require
from guerdon.language.policy import prompt_tokens
from guerdon.objectives.loss import Loss
from guerdon.rewards.critics.records import record_marks
from guerdon.rewards.spans import token_labels
from guerdon.rollout import Rollout

NAMES = ("poor", "neither", "good")  # labels -1, 0, 1, in the order of the logits
Dtype = Literal["float32", "float64", "bfloat16", "float16"]


class TokenClassifier(nn.Module):
    """Reads a prompt and a response, and labels the response's tokens.

    Any model of transformers with a token classification head will do, causal ones too, which judge a token by what stands
    before it and by itself. Tokens are those of the model's own tokenizer; what it says is read by characters, so that it
    can judge the samples of a policy with another one. Trained by the supervised loop, on records of feedback.

    Args:
        model: a model with a token classification head of three labels.
        tokenizer: a fast tokenizer, which knows the characters of its tokens.

    Raises:
        RecipeError: the tokenizer is not a fast one, or the head has another number of labels.
    """

    fields: tuple[str, ...] = ()
    has_critic = False

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        if not getattr(tokenizer, "is_fast", False):
            raise RecipeError(
                "critics.classifier: it needs a fast tokenizer, which knows the characters of its tokens."
            )
        if model.config.num_labels != len(NAMES):
            raise RecipeError(
                f"critics.classifier: the model has {model.config.num_labels} labels; {len(NAMES)} are needed: "
                f"{', '.join(NAMES)}. Train one with: guerdon train span-reward"
            )
        self.model, self.tokenizer = model, tokenizer
        padding = tokenizer.pad_token_id
        self.pad_id = next(i for i in (padding, tokenizer.eos_token_id, 0) if i is not None)
        self.train(False)

    @classmethod
    def load(
        cls,
        source: Any,
        *,
        tokenizer: Any = None,
        new_head: bool = False,
        dtype: Dtype = "float32",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> TokenClassifier:
        """Load a classifier, or put a new head on a model.

        Args:
            source: a folder or a name on the hub, or a configuration for an untrained model.
            tokenizer: needed with a configuration; None = the one beside the model.
            new_head: a model without such a head gets one, to be trained; else it is an error.
            dtype: of the weights.
            seed: of new weights. The global generator is left as it was.
            trust_remote_code: run model code that comes with the files.

        Raises:
            RecipeError: there is no such model, or it has no token classification head.
            MissingExtraError: transformers is not installed.
        """
        require("transformers", "language")
        from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer

        kind = getattr(torch, dtype)
        labels: dict[str, Any] = {
            "id2label": dict(enumerate(NAMES)),
            "label2id": {name: number for number, name in enumerate(NAMES)},
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if not isinstance(source, (str, Path)):
                for name, value in labels.items():
                    setattr(source, name, value)
                network = AutoModelForTokenClassification.from_config(source, dtype=kind)
                return cls(network, tokenizer)
            try:
                config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
                kinds = getattr(config, "architectures", None) or []
                if not new_head and not any(name.endswith("ForTokenClassification") for name in kinds):
                    raise RecipeError(
                        f"critics.classifier: {str(source)!r} is no token classifier but {', '.join(kinds) or 'something else'}. "
                        "Train one with: guerdon train span-reward"
                    )
                words = tokenizer or AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
                with _quiet():
                    network = AutoModelForTokenClassification.from_pretrained(
                        source, dtype=kind, trust_remote_code=trust_remote_code, **labels
                    )
            except RecipeError:
                raise
            except (OSError, ValueError) as error:  # what transformers raises for a wrong name, folder or file
                reason = str(error).split("\n")[0]
                raise RecipeError(
                    f"critics.classifier: {str(source)!r} cannot be loaded as a token classifier with its tokenizer: {reason}"
                ) from error
        return cls(network, words)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def max_steps(self) -> int:
        """The longest input there can be, in tokens."""
        text = self.model.config.get_text_config()
        return getattr(text, "max_position_embeddings", None) or 2**31

    def train(self, mode: bool = True) -> TokenClassifier:
        """Dropout stays off: the same batch gives the same gradient, whatever its parts."""
        super().train(False)
        return self

    def demonstrations(self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None = None) -> Rollout:
        """Records of feedback as a rollout with one response a prompt; a step is a token with a letter or digit.

        Args:
            rows: see `guerdon.rewards.critics.records`.
            seeds: not used: nothing is drawn.

        Returns:
            A rollout [B, 1, T] with the labels of tokens among its `steps`; `logp_old` is zero.

        Raises:
            DataError: naming the record that cannot be used.
        """
        prompts, texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
        wanted = [record_marks(row, f"record {i}") for i, row in enumerate(rows)]
        steps, offsets = self._packed(prompts, texts)
        labels = torch.zeros(steps["ids"].shape, dtype=torch.long)
        counted = torch.zeros(steps["ids"].shape, dtype=torch.bool)
        for i, (text, marks, places) in enumerate(zip(texts, wanted, offsets, strict=True)):
            of_tokens = token_labels(text, marks, places)
            labels[i, 0, : len(places)] = torch.tensor(of_tokens, dtype=torch.long) + 1
            # what has neither letter nor digit is never paid, so nothing is to be learnt of it
            said = [any(letter.isalnum() for letter in text[start:end]) for start, end in places]
            counted[i, 0, : len(places)] = torch.tensor(said, dtype=torch.bool)
        steps["labels"] = labels.to(self.device)
        return Rollout(
            prompts=prompts,
            samples=[[text] for text in texts],
            steps=steps,
            mask=counted.to(self.device),
            logp_old=torch.zeros(counted.shape, device=self.device),
            indices=list(range(len(rows))),
        )

    def imitation_loss(self, given: Rollout, *, module: Callable[..., Any] | None = None) -> Loss:
        """Cross-entropy of the labels, summed over the tokens that have one.

        Args:
            given: from `demonstrations`.
            module: what wraps the model, if anything does.

        Returns:
            The loss; count is the number of those tokens. `accuracy` is the share of labels that are the likeliest.

        Gradient:
            Through all weights.
        """
        logits = (module or self)(given.steps).float()
        labels = given.steps["labels"]
        loss = nn.functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
        right = (logits.argmax(-1) == labels)[given.mask].float()
        accuracy = right.mean() if len(right) else right.sum()
        return Loss(loss.where(given.mask, 0.0).sum(), given.mask.sum().to(loss.dtype), {"accuracy": accuracy})

    def forward(self, steps: dict[str, Tensor]) -> Tensor:
        """Logits [B, 1, T, 3] of the response's tokens.

        Args:
            steps: `prompt_ids`, `prompt_mask` [B, S], padded on the left; `ids`, `live` [B, 1, T], padded on the right.
        """
        before = steps["prompt_ids"].shape[1]
        ids = torch.cat([steps["prompt_ids"], steps["ids"][:, 0]], 1)
        mask = torch.cat([steps["prompt_mask"], steps["live"][:, 0]], 1)
        places = (mask.long().cumsum(1) - 1).clamp(min=0)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": places}
        if not _takes_positions(self.model):
            del inputs["position_ids"]
        return self.model(**inputs).logits[:, before:].unsqueeze(1)

    @torch.inference_mode()
    def marks(self, prompts: Sequence[Any], texts: Sequence[str], *, continuous: bool = False) -> list[list[float]]:
        """The label of each character of every text.

        Args:
            prompts: B prompts, texts or messages.
            texts: B responses.
            continuous: the probability of good less that of poor, in place of the likeliest label.

        Raises:
            DataError: naming what cannot be encoded.
        """
        steps, offsets = self._packed(prompts, texts)
        chances = self(steps).float().softmax(-1)[:, 0]
        found = chances[..., 2] - chances[..., 0] if continuous else (chances.argmax(-1) - 1).float()
        marks = []
        for text, places, values in zip(texts, offsets, found.tolist(), strict=True):
            own = [0.0] * len(text)
            for (start, end), value in zip(places, values, strict=False):
                own[start:end] = [value] * (end - start)
            marks.append(own)
        return marks

    def _packed(
        self, prompts: Sequence[Any], texts: Sequence[str]
    ) -> tuple[dict[str, Tensor], list[list[tuple[int, int]]]]:
        """The tokens of prompts and responses, and the characters of the latter's."""
        before, after, offsets = [], [], []
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            try:
                ids = prompt_tokens(self.tokenizer, prompt)
                found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            except Exception as error:  # tokenizers raise bare exceptions
                raise DataError(
                    f"critics.classifier: response {i}, {text!r:.80}, cannot be encoded after its prompt: {error}."
                ) from error
            if len(ids) + len(found.input_ids) > self.max_steps:
                raise DataError(
                    f"critics.classifier: response {i} is too long: {len(ids)} tokens of its prompt and "
                    f"{len(found.input_ids)} are more than the {self.max_steps} positions of the model."
                )
            before.append(ids)
            after.append(found.input_ids)
            offsets.append([(start, end) for start, end in found.offset_mapping])
        width, length = max(map(len, before), default=0), max(max(map(len, after), default=0), 1)
        steps = {
            "prompt_ids": torch.tensor([[self.pad_id] * (width - len(row)) + row for row in before]),
            "prompt_mask": torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in before]),
            "ids": torch.tensor([[row + [self.pad_id] * (length - len(row))] for row in after]),
            "live": torch.tensor([[[True] * len(row) + [False] * (length - len(row))] for row in after]),
        }
        return {name: value.to(self.device) for name, value in steps.items()}, offsets

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write model and tokenizer as transformers does; `load` reads them.

        Args:
            folder: where to; made if it is not there.
            state: the `state_dict` with whole tensors, where the model's own are shards; None = its own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        whole = None
        if state is not None:
            whole = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        self.model.save_pretrained(folder, state_dict=whole)
        self.tokenizer.save_pretrained(folder)

    def load_weights(self, folder: str | Path) -> None:
        """Put back what `save` wrote.

        Raises:
            CheckpointError: the folder holds another model.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            state: dict[str, Tensor] = {}
            for path in sorted(folder.glob("model*.safetensors")):
                state |= load_file(path)
            self.model.load_state_dict(state)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: the weights cannot be read: {error}") from error


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers tells that the head is new, which it is meant to be."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
