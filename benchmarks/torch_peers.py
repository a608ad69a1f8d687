"""PyTorch's optimizers on a GPU, for comparison with a copy of the same bytes."""

from collections.abc import Callable
import dataclasses
import importlib
import time
from typing import Any


@dataclasses.dataclass(frozen=True)
class Peer:
  """An optimizer with PyTorch's interface.

  Attributes:
    name: its name in the table.
    module: the module to import it from.
    make: (module, parameters) -> optimizer.
    dtype: the name of the dtype of weights and gradients.
  """

  name: str
  module: str
  make: Callable[[Any, list], Any]
  dtype: str = "bfloat16"


PEERS = [
  Peer(
    "torch.optim.AdamW(fused=True), fp32",
    "torch.optim",
    lambda m, p: m.AdamW(p, fused=True),
    "float32",
  ),
  Peer(
    "torch.optim.AdamW(fused=True), all bf16",
    "torch.optim",
    lambda m, p: m.AdamW(p, fused=True),
  ),
  Peer("flashoptim.FlashAdamW", "flashoptim", lambda m, p: m.FlashAdamW(p)),
  Peer("torchao AdamW8bit", "torchao.optim", lambda m, p: m.AdamW8bit(p)),
  Peer("bitsandbytes AdamW8bit", "bitsandbytes.optim", lambda m, p: m.AdamW8bit(p)),
]


def load(peer: Peer):
  """Imports the peer's module; raises ImportError if it or a GPU is absent."""
  module = importlib.import_module(peer.module)
  if not importlib.import_module("torch").cuda.is_available():
    raise ImportError("PyTorch finds no GPU")
  return module


def nbytes(x) -> int:
  """The bytes on the GPU in tensors, tensor subclasses, containers and other objects."""
  import torch

  if isinstance(x, torch.Tensor):
    if hasattr(x, "__tensor_flatten__"):
      return sum(nbytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size() if x.is_cuda else 0
  if isinstance(x, dict):
    return sum(map(nbytes, x.values()))
  if isinstance(x, (list, tuple)):
    return sum(map(nbytes, x))
  return nbytes(vars(x)) if hasattr(x, "__dict__") else 0


def prepare(peer: Peer, module, shape: tuple[int, ...]):
  """(step, copy, bytes that a step reads and writes, resident bytes)."""
  import torch

  dtype = getattr(torch, peer.dtype)
  w = torch.nn.Parameter((0.02 * torch.randn(shape, device="cuda")).to(dtype))
  w.grad = torch.randn(shape, device="cuda").to(dtype)
  optimizer = peer.make(module, [w])
  optimizer.step()  # creates the state
  state = nbytes(w.data) + nbytes(dict(optimizer.state))
  moved = nbytes(w.grad) + 2 * state
  source = torch.zeros(moved // 8, device="cuda")
  target = torch.empty_like(source)
  return optimizer.step, lambda: target.copy_(source), moved, state


def seconds(run, repeats: int) -> float:
  """The mean time of a call, in seconds."""
  import torch

  torch.cuda.synchronize()
  start = time.perf_counter()
  for _ in range(repeats):
    run()
  torch.cuda.synchronize()
  return (time.perf_counter() - start) / repeats
