"""The other side of the benchmark: what a user of peft writes for prompt tuning with the same regulariser."""

from typing import Any

import torch
from torch import Tensor

from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.heads import Head
from ptp_ds.objective import cross_entropy_sum, divergence_sum
from ptp_ds.tasks.example import Example


class PaddedScores:
    """Candidates' log-probabilities by a peft model's own forward, over padded rows.

    model: whatever peft made. keep: whether logits are computed at the answers alone. tail: tokens behind texts.
    """

    def __init__(self, model: Any, head: Head, device: torch.device, keep: bool, tail: tuple[int, ...] = ()) -> None:
        self.model, self.head, self.device = model, head, device
        self.classes, self.keep, self.tail = head.kind == "classes", keep, list(tail)

    def pad(self, examples: list[Example]) -> dict[str, Tensor]:
        """Sequences [rows x candidates or rows, L], their mask and where the answers lie."""
        single = all(len(candidate) == 1 for example in examples for candidate in example.candidate_ids)
        rows: list[tuple[list[int], list[list[int]]]] = []
        for example in examples:
            answers = [list(answer) for answer in example.candidate_ids]
            if self.classes:
                rows.append((list(example.context_ids) + self.tail, answers))
            elif single:
                rows.append((list(example.context_ids), answers))
            else:
                rows.extend((list(example.context_ids) + answer[:-1], [answer]) for answer in answers)
        longest = max(len(ids) for ids, _ in rows)
        ids_RL = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_RL = torch.zeros(len(rows), longest, dtype=torch.long)
        for number, (ids, _) in enumerate(rows):
            place = slice(longest - len(ids), longest) if self.keep and not self.classes else slice(0, len(ids))
            ids_RL[number, place], mask_RL[number, place] = torch.tensor(ids), 1
        self.rows, self.single, self.longest = rows, single, longest
        self.gold = torch.tensor([example.gold for example in examples], device=self.device)
        return {"ids": ids_RL.to(self.device), "mask": mask_RL.to(self.device)}

    def scores(self, embeds_RLH: Tensor, mask_RL: Tensor, **more: Tensor) -> Tensor:
        """[B, C] candidate log-probabilities by peft's own forward. more: what else it is given."""
        if self.classes:
            return self.model(inputs_embeds=embeds_RLH, attention_mask=mask_RL, **more).logits
        most = max(len(answer) for _, answers in self.rows for answer in answers)
        keep = {"logits_to_keep": most} if self.keep else {}
        logits = self.model(inputs_embeds=embeds_RLH, attention_mask=mask_RL, **keep, **more).logits
        parts = []
        for number, (ids, answers) in enumerate(self.rows):
            size = len(answers[0])
            end = logits.shape[1] if self.keep else logits.shape[1] - self.longest + len(ids)
            log_probs = logits[number, end - size : end].float().log_softmax(-1)
            for answer in answers:
                parts.append(log_probs[torch.arange(size), torch.tensor(answer)].sum())
        return torch.stack(parts).view(self.gold.shape[0], -1)


class PeftLoop(PaddedScores):
    """What a user of peft writes: padded rows, one full pass for each stream and ascent step.

    Prompt or prefix tuning of a causal model, or of an encoder with a classifier that is trained beside the prompt.
    """

    def __init__(
        self, base: Any, trained: Tensor, device: torch.device, keep: bool, rows: int, head: Head, prompt: str,
        tail: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """base: a transformers model on `device`. trained: prompt and head to start from. keep: whether logits are
        computed at the answers alone. rows: examples of a micro-batch. prompt: soft or deep. tail: tokens behind texts.
        """
        from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

        base.eval()
        made = {"soft": PromptTuningConfig, "deep": PrefixTuningConfig}[prompt]
        self.prompt_length, self.tokens, self.micro_batch = head.split(trained)[0].shape[0], 0, rows
        kind = "SEQ_CLS" if head.kind == "classes" else "CAUSAL_LM"
        model = get_peft_model(base, made(task_type=kind, num_virtual_tokens=self.prompt_length))
        super().__init__(model, head, device, keep, tail)
        self.start(trained)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        self.embed = base.get_input_embeddings()

    @torch.no_grad()
    def start(self, trained: Tensor) -> None:
        """Prompt and head back at `trained`."""
        prompt, tensors = self.head.split(trained)
        self.model.prompt_encoder["default"].embedding.weight.copy_(prompt)
        for name, parameter in self.model.base_model.named_parameters():
            wanted = tensors.get(name.replace("modules_to_save.default.", ""))
            if wanted is not None and parameter.requires_grad:
                parameter.copy_(wanted)

    def step(self, examples: list[Example], method: str, run: RunConfig, unit: float) -> float:
        """One optimizer step, a micro-batch at a time (it keeps every activation); returns the summed loss."""
        total, self.tokens = 0.0, 0
        for first in range(0, len(examples), self.micro_batch):
            loss = self._loss(examples[first : first + self.micro_batch], method, run, unit)
            (loss / len(examples)).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _loss(self, examples: list[Example], method: str, run: RunConfig, unit: float) -> Tensor:
        padded = self.pad(examples)
        self.tokens += (1 if method == "none" else 2) * len(self.rows) * (self.prompt_length + self.longest)
        with torch.no_grad():
            clean = self.embed(padded["ids"])
        scores = self.scores(clean, padded["mask"])
        loss = cross_entropy_sum(scores, self.gold)
        if method != "none":
            scale = run.sigma * unit / clean.shape[-1] ** 0.5
            delta = torch.randn_like(clean) * scale * padded["mask"][..., None]
            for _ in range(run.ascent_steps if method == "pgd" else 0):
                delta = self._ascend(clean, delta, padded["mask"], scores.detach(), run, unit)
            perturbed = self.scores(clean + delta, padded["mask"])
            loss = loss + run.reg_weight * divergence_sum(
                run.divergence, scores, perturbed, self.gold, run.divergence_gradient == "clean_fixed"
            )
        return loss

    def _ascend(
        self, clean: Tensor, delta: Tensor, mask: Tensor, scores: Tensor, run: RunConfig, unit: float
    ) -> Tensor:
        delta = delta.detach().requires_grad_()
        objective = divergence_sum(run.divergence, scores, self.scores(clean + delta, mask), self.gold)
        (gradient,) = torch.autograd.grad(objective, delta)
        moved = delta + run.step_length * unit * gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        moved = moved.detach() * mask[..., None]
        return moved * (run.epsilon * unit / moved.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
