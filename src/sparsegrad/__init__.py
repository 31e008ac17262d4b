r"""SparseGrad: fine-tune MLP layers in the few entries that carry their gradient in an HOSVD basis (arXiv 2410.07383).

Example:
    targets = {"up": r".*\.layer\.(?P<layer>\d+)\.intermediate\.dense", "down": ...}
    bases = {kind: hosvd(moments) for kind, moments in collect_moments(model, batches, targets).items()}
    sparsify(model, bases, k=28_000, target_modules=targets)
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-4)  # in place of torch.optim.AdamW
    ...                                                        # train as before
    merge(model)                                               # a plain model again
"""

from sparsegrad.adapter import AdapterState, adapter_state, load_adapter, put_adapter, save_adapter
from sparsegrad.basis import Basis, GradientMoments, hosvd, hosvd_of_unfoldings, hosvd_tensorly, random_basis
from sparsegrad.collect import collect_moments
from sparsegrad.compact import CompactGradient
from sparsegrad.config import SparseGradConfig
from sparsegrad.convert import merge, sparsegrad_layers, sparsify
from sparsegrad.core import core_shape
from sparsegrad.folded import FoldedLinear
from sparsegrad.io import load_bases, load_tensors, save_bases, save_tensors
from sparsegrad.linear import SparseGradLinear
from sparsegrad.model import SparseGradModel, get_sparsegrad_model
from sparsegrad.optim import SparseGradAdamW, lazy_adam_delta
from sparsegrad.parameters import clip_grad_norm_, param_groups
from sparsegrad.quantized import QuantizedTruncatedLinear
from sparsegrad.refresh import refresh
from sparsegrad.rotated import RotatedLinear
from sparsegrad.select import NonFiniteGradient, entries_for_density, top_k
from sparsegrad.targets import Target, architectures, find_targets, resolve_targets
from sparsegrad.truncated import TruncatedLinear

__version__ = "0.2.0"

__all__ = [
    "AdapterState",
    "Basis",
    "CompactGradient",
    "FoldedLinear",
    "GradientMoments",
    "NonFiniteGradient",
    "QuantizedTruncatedLinear",
    "RotatedLinear",
    "SparseGradAdamW",
    "SparseGradConfig",
    "SparseGradLinear",
    "SparseGradModel",
    "Target",
    "TruncatedLinear",
    "adapter_state",
    "architectures",
    "clip_grad_norm_",
    "collect_moments",
    "core_shape",
    "entries_for_density",
    "find_targets",
    "get_sparsegrad_model",
    "hosvd",
    "hosvd_of_unfoldings",
    "hosvd_tensorly",
    "lazy_adam_delta",
    "load_adapter",
    "load_bases",
    "load_tensors",
    "merge",
    "param_groups",
    "put_adapter",
    "random_basis",
    "refresh",
    "resolve_targets",
    "save_adapter",
    "save_bases",
    "save_tensors",
    "sparsegrad_layers",
    "sparsify",
    "top_k",
]
