"""What an encoder computes on the way, taken by hooks: nothing is asked of the model around it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..encoders import Encoder


@dataclass
class Encoded:
    """What one pass of an encoder computed.

    Attributes:
        attention_mask: ``(batch, tokens)``, 1 = real; ``None`` if all are.
        hidden_states: what the first layer was given, and what each layer gave, ``(batch, tokens, hidden)``.
        attentions: layer -> attention weights, ``(batch, heads, tokens, tokens)``; ``None`` where the
            attention in use does not compute them.
    """

    attention_mask: Tensor | None
    hidden_states: list[Tensor] = field(default_factory=list)
    attentions: dict[int, Tensor | None] = field(default_factory=dict)


class EncoderRecorder:
    """Hooks on an encoder that keep what its passes compute, while they are told to.

    A pass begins with the embeddings and ends with the last layer: some libraries call the encoder's
    ``forward``, past the hooks of the encoder itself.

    Args:
        encoder: what is recorded.
        attention: whether to keep attention weights.
    """

    def __init__(self, encoder: Encoder, *, attention: bool) -> None:
        self.encoder, self.attention = encoder, attention
        self._passes: list[Encoded] = []
        self._recording = False
        self._present: Encoded | None = None
        self._given: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def install(self) -> None:
        """Register the hooks."""
        layout = self.encoder.dense.layout
        encoder, layers = self.encoder.module, [layer.module for layer in self.encoder.layers]
        embeddings = encoder.get_submodule(layout.embeddings)
        self._handles = [
            encoder.register_forward_pre_hook(self._called, with_kwargs=True),
            embeddings.register_forward_hook(self._embedded),
            layers[0].register_forward_pre_hook(self._entered, with_kwargs=True),
            *(layer.register_forward_hook(self._keep) for layer in layers),
            layers[-1].register_forward_hook(self._leave),
        ]
        for index, layer in enumerate(self.encoder.layers if self.attention else ()):
            if layer.structure.kept["heads"]:
                module = layer.module.get_submodule(layout.attention)
                hook = partial(self._keep_attention, index)
                self._handles.append(module.register_forward_pre_hook(self._ask, with_kwargs=True))
                self._handles.append(module.register_forward_hook(hook))

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self) -> None:
        """Forget what was recorded, and record from now on."""
        self._passes, self._present, self._given, self._recording = [], None, None, True

    def end(self) -> list[Encoded]:
        """Stop recording.

        Returns:
            The passes recorded, in their order.
        """
        found, self._passes = self._passes, []
        self._present, self._given, self._recording = None, None, False
        return found

    def _called(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._recording:
            mask = _argument(module, "attention_mask", args, kwargs)
            self._given = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _embedded(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if self._recording:
            self._present = Encoded(self._given)
            self._given = None

    def _entered(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._present is None:
            return
        # Not what the embeddings gave: ELECTRA projects it.
        self._present.hidden_states.append(args[0] if args else kwargs["hidden_states"])
        if self._present.attention_mask is None:
            self._present.attention_mask = _real_tokens(_argument(module, "attention_mask", args, kwargs))

    def _keep(self, module: nn.Module, args: Any, out: Any) -> None:
        # Layers run again, in the backward pass, under activation checkpointing.
        if self._present is not None:
            self._present.hidden_states.append(out if isinstance(out, Tensor) else out[0])

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._present is not None:
            self._passes.append(self._present)
            self._present = None

    def _ask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Have an attention that returns its weights only when told to (MPNet, DeBERTa) return them."""
        signature = inspect.signature(type(module).forward)
        if self._present is None or "output_attentions" not in signature.parameters:
            return None
        bound = signature.bind_partial(module, *args, **kwargs)
        bound.arguments["output_attentions"] = True
        return bound.args[1:], bound.kwargs

    def _keep_attention(self, index: int, module: nn.Module, args: Any, out: Any) -> None:
        if self._present is not None:
            self._present.attentions[index] = out[1] if len(out) > 1 else None


def _argument(module: nn.Module, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    return inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments.get(name)


def _real_tokens(mask: Any) -> Tensor | None:
    """Which keys a layer's attention mask leaves, ``(batch, tokens)``; ``None`` if it masks nothing.

    Args:
        mask: ``(batch, tokens)``, or ``(batch, 1, queries, keys)``, bool or added to the scores.
    """
    if not isinstance(mask, Tensor) or mask.dim() == 2:
        return mask if isinstance(mask, Tensor) else None
    open_keys = mask if not mask.is_floating_point() else mask == 0
    return open_keys[:, 0].any(dim=-2)
