"""LoRA (Hu et al., 2021) on examples: loss on the answers' tokens only, stopped where it rises again.

peft puts the matrices in and writes them; the loop is here. One example at a time goes through the
model, so that nothing is padded, and logits are computed for the answer's places only.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.errors import GeneratorError, InputError
from rag.finetune.examples import Example
from rag.settings import Settings

if TYPE_CHECKING:
    import torch

_WARMUP = 0.05  # of the training
_LAST_RATE = 0.1  # of the rate, at the end
_LOOKS_AN_EPOCH = 2  # at the loss on the questions to stop by


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """`rate` is AdamW's; `minutes` end the training early, 0 does not; `patience` is the number of
    looks without a lower loss after which it ends."""

    epochs: int = 3
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    rate: float = 3e-4
    batch: int = 8
    minutes: float = 0.0
    patience: int = 3

    def __post_init__(self) -> None:
        lowest = {"epochs": 1, "rank": 1, "alpha": 1e-6, "dropout": 0.0, "rate": 1e-8, "batch": 1,
                  "minutes": 0.0, "patience": 1}  # fmt: skip
        for name, low in lowest.items():
            if not getattr(self, name) >= low:  # NaN fails too
                raise InputError(f"--{name} is {getattr(self, name)}; it must be at least {low:g}.")
        if self.dropout >= 1.0:
            raise InputError(f"--dropout is {self.dropout}; it must be below 1.")


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the loss (nats a token) on the questions to stop by."""

    step: int
    epoch: float
    seconds: float
    loss: float
    training_loss: float  # mean since the last look; 0.0 at the first


class LoraTraining:
    """A base with LoRA matrices beside all its linear layers, the output's excepted."""

    def __init__(self, settings: Settings, options: TrainingOptions) -> None:
        """Loads the generator that the settings name: on a processor in float32 unless they name
        another dtype. Raises GeneratorError where it can't be, InputError without peft."""
        try:
            from peft import LoraConfig, get_peft_model
        except ModuleNotFoundError as error:
            raise InputError(
                f"fine-tuning needs the package {error.name}: pip install 'local-rag[finetune]'"
            ) from error
        import torch

        from rag.engine.placement import choose_device, choose_dtype
        from rag.generator import check_folder, find_model, load_model

        self.options = options
        self._seed = settings.seed
        self.device = choose_device(settings.device)
        if settings.dtype in ("int8", "int4"):
            raise InputError(
                f"setting dtype is {settings.dtype}; weights are trained in auto, float32, bfloat16 or "
                "float16. The adapter can be used with fewer bits afterwards."
            )
        is_plain = settings.dtype == "auto" and self.device.type == "cpu"
        dtype = torch.float32 if is_plain else choose_dtype(settings.dtype, self.device)
        folder = find_model(settings.generator)
        check_folder(folder, settings.generator)
        torch.manual_seed(settings.seed)
        base = load_model(folder, settings.generator, dtype).to(self.device)
        config = LoraConfig(
            r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout,  # type: ignore[arg-type]
            target_modules="all-linear", task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # peft asks transformers by a name that is to go.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            self.model: Any = get_peft_model(base, config)
        # Not the path on this machine: what the adapter belongs to stands in the record.
        self.model.peft_config["default"].base_model_name_or_path = settings.generator
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.num_trained = sum(p.numel() for p in self.trained)

    def loss(self, examples: Sequence[Example]) -> float:
        """Mean negative log-likelihood (nats) of an answer's token."""
        import torch

        self.model.eval()
        total = tokens = 0.0
        with torch.no_grad():
            for example in examples:
                total += float(self._sum_of_losses(example))
                tokens += len(example.answer_ids)
        return total / tokens

    def _sum_of_losses(self, example: Example) -> torch.Tensor:
        import torch

        ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]], device=self.device)  # (1, T)
        wanted = torch.tensor(example.answer_ids, device=self.device)  # (A,)
        # The token before the answer speaks its first one; what follows its end is not asked.
        logits = self.model(input_ids=ids, logits_to_keep=len(wanted) + 1, use_cache=False).logits
        spoken = logits[0, -len(wanted) - 1 : -1].float()  # (A, V)
        return torch.nn.functional.cross_entropy(spoken, wanted, reduction="sum")

    def run(
        self, train: Sequence[Example], stop: Sequence[Example], show: Callable[[Look], None]
    ) -> tuple[Look, Look]:
        """Train, and keep the weights with the lowest loss on `stop`. Returns the first look and the best.

        Raises GeneratorError where the loss is no number.
        """
        import torch

        options = self.options
        began = time.perf_counter()
        steps_an_epoch = math.ceil(len(train) / options.batch)
        total = options.epochs * steps_an_epoch
        every = max(1, steps_an_epoch // _LOOKS_AN_EPOCH)
        optimiser = torch.optim.AdamW(self.trained, lr=options.rate, weight_decay=0.0)
        first = best = Look(0, 0.0, 0.0, self.loss(stop), 0.0)
        kept = self._copy()
        show(first)
        shuffled = random.Random(self._seed)
        since_look: list[float] = []
        worse = step = 0
        for _ in range(options.epochs):
            order = shuffled.sample(range(len(train)), len(train))
            for start in range(0, len(order), options.batch):
                spent = time.perf_counter() - began
                is_late = bool(options.minutes) and spent >= 60 * options.minutes
                if not is_late:
                    share = max(step / total, spent / (60 * options.minutes) if options.minutes else 0.0)
                    batch = [train[at] for at in order[start : start + options.batch]]
                    since_look.append(self._step(batch, optimiser, share))
                    step += 1
                if step and (is_late or step % every == 0 or step == total) and since_look:
                    mean = sum(since_look) / len(since_look)
                    look = Look(
                        step, step / steps_an_epoch, time.perf_counter() - began, self.loss(stop), mean
                    )
                    since_look = []
                    show(look)
                    if not math.isfinite(look.loss):
                        raise GeneratorError(
                            f"after {step} steps the loss is {look.loss}. Train with a lower --rate than {options.rate:g}."
                        )
                    if look.loss < best.loss:
                        best, kept, worse = look, self._copy(), 0
                    else:
                        worse += 1
                if is_late or worse >= options.patience:
                    self._restore(kept)
                    return first, best
        self._restore(kept)
        return first, best

    def _step(self, batch: Sequence[Example], optimiser: torch.optim.Optimizer, share: float) -> float:
        """One update; `share` of the training lies behind. Returns the loss (nats a token)."""
        import torch

        rise = min(1.0, (share + 1e-3) / _WARMUP)
        for group in optimiser.param_groups:
            group["lr"] = self.options.rate * rise * (1 - (1 - _LAST_RATE) * min(1.0, share))
        self.model.train()
        tokens = sum(len(example.answer_ids) for example in batch)
        total = 0.0
        for example in batch:
            loss = self._sum_of_losses(example) / tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return total

    def _copy(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.trained]

    def _restore(self, kept: Sequence[torch.Tensor]) -> None:
        import torch

        with torch.no_grad():
            for parameter, value in zip(self.trained, kept, strict=True):
                parameter.copy_(value)

    def save(self, folder: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json into the folder."""
        # "auto" would ask the hub whether the vocabulary is still the base's.
        self.model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty form
