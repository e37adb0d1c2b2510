"""MiniOneRec: a language model that reads and writes semantic ids and text (arXiv 2510.24431)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.recsys.data.sequences import PADDING
from examples.recsys.decoding import NextLogProbs
from examples.recsys.models.base import Batch
from examples.recsys.models.causal import IGNORED, next_code_scorer, small_qwen3, token_loss
from examples.recsys.models.generative import GenerativeRecommender, draw_targets
from examples.recsys.models.prompts import TEXT_TASKS, Example, ItemTokens, PromptWriter, Task, Tokens, draw_example
from lightning_muon import MuonMixin


class MiniOneRec(MuonMixin, GenerativeRecommender):
    """A causal language model, fine-tuned on up to five tasks, that generates the codes of the next item.

    Every code is a new token in the vocabulary; ``<a_17>`` is code 17 of the first level. Each row of a training batch
    draws one of the tasks. The loss is over the tokens of the responses:

    - ``"next_item"``: codes of the history -> codes of the next item. Evaluation uses this task.
    - ``"item_text"``: codes of an item -> its title or description, or the other way round; any item of the catalogue.
    - ``"fusion"``: codes of the history -> title of the next item.
    - ``"titles"``: titles of the history -> title of the next item.
    - ``"titles_to_codes"``: titles of the history -> codes of the next item.

    If a row of the data has several targets (``samples: sequence``), each epoch draws one of them. Prompts are built in
    the training process from texts that are tokenized once.

    A pretrained model comes from ``checkpoint``. Without it a small Qwen3 with random weights reads bytes. Save a
    fine-tuned model for other programs by ``model.lm.save_pretrained`` and ``model.tokenizer.save_pretrained``. With
    ``lora`` save it as a checkpoint of the Trainer only: ``save_pretrained`` leaves the factors out.
    ``load_from_checkpoint`` reads architecture and tokenizer from ``checkpoint`` again, so do not delete it.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        semantic_ids: path of the codes of all items, as :meth:`SemanticIds.read` reads them.
        checkpoint: folder or hub name of a causal language model of ``transformers``, e.g. ``"Qwen/Qwen2.5-0.5B"``.
        tokenizer: folder or hub name; None for that of the checkpoint, or for bytes without a checkpoint.
        tasks: which of the five.
        cutoff: largest number of tokens of a prompt and its response; the oldest items of a history are dropped first.
        lora: options of ``peft.LoraConfig``, such as ``{"r": 16, "lora_alpha": 32}``. Then the weights are frozen, and
            low-rank factors of the linear layers (all, or those in ``target_modules``) and the embeddings of the codes
            are trained. None trains all weights.
        gradient_checkpointing: whether the backward pass recomputes activations to save memory.
        hidden_size: width d of the model without checkpoint. The next arguments up to ``dropout`` are for it, too.
        num_layers: number of layers.
        num_heads: number of attention heads.
        num_kv_heads: number of key and value heads; groups of query heads share them.
        intermediate_size: inner width of the feed-forward.
        tied: whether the output layer is the embedding of the tokens.
        dropout: dropout of the embeddings and of each half block's output.
        num_beams: number of beams, with any model.
        mask_history: whether validation leaves the items of the history out of the ranking.
        **kwargs: optimizers, schedule and rules of :class:`lightning_muon.MuonMixin`.

    Raises:
        FileNotFoundError: if there is no file ``semantic_ids``.
        OSError: if there is no such checkpoint or tokenizer.
        ImportError: if ``lora`` is given and ``peft`` is not installed.
        ValueError: if the codes are of another catalogue, a size is below 1, a number of heads does not divide, a task
            or an option of LoRA is unknown, or ``cutoff`` is too small; in ``setup``, if tasks need titles and the data
            have none.
    """

    code_tokens: Tensor
    """(levels, codebook_size) the token of each code."""

    def __init__(
        self,
        num_items: int,
        semantic_ids: str,
        checkpoint: str | None = None,
        tokenizer: str | None = None,
        tasks: Sequence[Task] = get_args(Task),
        cutoff: int = 512,
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        intermediate_size: int = 512,
        tied: bool = True,
        dropout: float = 0.1,
        num_beams: int = 50,
        mask_history: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_items=num_items, semantic_ids=semantic_ids, num_beams=num_beams, mask_history=mask_history, **kwargs
        )
        self.save_hyperparameters()
        unknown = [task for task in tasks if task not in get_args(Task)]
        if unknown or not tasks:
            raise ValueError(f"tasks must be one or more of {', '.join(get_args(Task))}, got {list(tasks)}.")
        self.tasks = list(tasks)
        self.draws = torch.Generator()
        self.tokenizer = _load_tokenizer(tokenizer or checkpoint)
        known_tokens = len(self.tokenizer)
        self.register_buffer(
            "code_tokens", add_code_tokens(self.tokenizer, self.levels, self.codebook_size), persistent=False
        )
        self.writer = PromptWriter(self._encode, self.tokenizer.eos_token_id, cutoff, self.levels)
        codes = self.code_tokens[torch.arange(self.levels), self.codes[1:]]
        self.item_tokens = ItemTokens([[], *codes.tolist()])
        if checkpoint is None:
            self.lm = small_qwen3(
                len(self.tokenizer),
                hidden_size,
                num_layers,
                num_heads,
                num_kv_heads,
                intermediate_size,
                tied,
                dropout,
            )
        else:
            # The files may be in bfloat16. The default type is float32 unless the Trainer has a true half precision.
            self.lm = AutoModelForCausalLM.from_pretrained(
                os.path.expanduser(checkpoint), dtype=torch.get_default_dtype(), attn_implementation="sdpa"
            ).train()
            extend_embeddings(self.lm, known_tokens, len(self.tokenizer))
        if lora is not None:
            self.lm = add_lora(self.lm, lora, self.code_tokens)
        if gradient_checkpointing:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})

    def prepare_data(self) -> None:
        """Load the titles in one process per node, since they may have to be downloaded."""
        if self.trainer.state.fn == "fit" and self._tasks_with_text:
            self._item_titles()

    def setup(self, stage: str) -> None:
        """Take titles and descriptions from the data if a task of the training needs them."""
        if stage == "fit" and self._tasks_with_text:
            texts = self._item_titles(), self.trainer.datamodule.item_descriptions()
            titles, descriptions = ([[], *map(self._encode, some)] for some in texts)
            self.item_tokens = ItemTokens(self.item_tokens.codes, titles, descriptions)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        # All processes start with the same random state and would draw the same tasks and items.
        self.draws.manual_seed(torch.initial_seed() + self.global_rank)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        histories, targets = draw_targets(batch["history"], batch["targets"])
        examples = [
            draw_example(self.tasks, self.writer, history, target, self.item_tokens, self.draws)
            for history, target in zip(_item_lists(histories), targets.tolist(), strict=True)
        ]
        tokens, labels = (part.to(self.device) for part in stack_examples(examples))
        # The padding is on the right, so the causal mask hides it.
        states = self.lm.base_model(tokens, use_cache=False).last_hidden_state
        loss = token_loss(self.lm, states, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(examples))
        return loss

    def next_code_scorer(self, batch: Batch) -> NextLogProbs:
        prompts = [self.writer.next_item(history, self.item_tokens) for history in _item_lists(batch["history"])]
        padded = pad_sequence(list(map(torch.tensor, prompts)), batch_first=True, padding_side="left")
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        real = torch.arange(padded.shape[1]) >= padded.shape[1] - lengths
        return next_code_scorer(self.lm, padded.to(self.device), real.to(self.device), self.code_tokens)

    @property
    def _tasks_with_text(self) -> list[Task]:
        return [task for task in self.tasks if task in TEXT_TASKS]

    def _item_titles(self) -> list[str]:
        data = getattr(self.trainer, "datamodule", None)
        titles = [] if data is None else data.item_titles()
        if data is None or titles == data.item_names():
            source = "the Trainer has no data module" if data is None else f"{type(data).__name__} has none"
            raise ValueError(
                f"The tasks {', '.join(self._tasks_with_text)} need the titles of the items, but {source}. Set tasks "
                "to [next_item], or use data with titles."
            )
        return titles

    def _encode(self, text: str) -> Tokens:
        return self.tokenizer.encode(text, add_special_tokens=False)


def add_code_tokens(tokenizer: PreTrainedTokenizerBase, levels: int, codebook_size: int) -> Tensor:
    """Add ``<a_0>``, ``<a_1>``, ..., ``<b_0>``, ... unless they exist; returns their ids (levels, codebook_size)."""
    names = [f"<{chr(ord('a') + level)}_{code}>" for level in range(levels) for code in range(codebook_size)]
    tokenizer.add_tokens(names)
    return torch.tensor(tokenizer.convert_tokens_to_ids(names)).view(levels, codebook_size)


def extend_embeddings(model: PreTrainedModel, known_tokens: int, num_tokens: int) -> None:
    """Grow the embeddings to ``num_tokens`` rows, and initialize the rows from ``known_tokens`` on.

    Each new row is drawn from a normal distribution with the mean and the standard deviation of the known rows in each
    dimension. This includes spare rows, which many models have and nobody trained.
    """
    if num_tokens > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    # A tied table is drawn twice, which does no harm.
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        with torch.no_grad():
            known, new = table[:known_tokens].float(), table[known_tokens:num_tokens]
            new.copy_(known.mean(0) + known.std(0) * torch.randn_like(new, dtype=torch.float32))


def add_lora(model: PreTrainedModel, options: dict[str, Any], code_tokens: Tensor) -> PreTrainedModel:
    """Freeze a model except the embeddings of the codes, and add low-rank factors to its linear layers.

    Raises:
        ImportError: if ``peft`` is not installed.
        ValueError: if ``peft`` does not know an option, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            "lora needs the package peft: `pip install peft`, or leave lora out to train all weights."
        ) from error
    tables = {id(model.get_input_embeddings().weight): model.get_input_embeddings()}
    # If the output layer is tied to the input, peft ties its additions, too.
    tables.setdefault(id(model.get_output_embeddings().weight), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is table for table in tables.values())]
    trained = {name: code_tokens.flatten().tolist() for name in names}
    try:
        config = LoraConfig(**{"target_modules": "all-linear", "trainable_token_indices": trained, **options})
    except TypeError as error:
        raise ValueError(
            f"peft.LoraConfig does not take lora={options} ({error}): give its options, such as r, lora_alpha, "
            "lora_dropout and target_modules."
        ) from None
    return get_peft_model(model, config).get_base_model()


def stack_examples(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Batch examples into tokens (B, S) and labels (B, S), padded on the right.

    The label at a position is the next token if it belongs to the response, else ``IGNORED``.
    """
    tokens = [torch.tensor([*prompt, *response][:-1]) for prompt, response in examples]
    labels = [torch.tensor([IGNORED] * (len(prompt) - 1) + response) for prompt, response in examples]
    return pad_sequence(tokens, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def _load_tokenizer(source: str | None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub; None gives one of bytes, which needs no files."""
    if source is None:
        return ByT5Tokenizer(extra_ids=0)
    return AutoTokenizer.from_pretrained(os.path.expanduser(source))


def _item_lists(history: Tensor) -> list[list[int]]:
    """Histories (B, T), padded on the right, as lists of item ids."""
    return [[item for item in row if item != PADDING] for row in history.tolist()]
