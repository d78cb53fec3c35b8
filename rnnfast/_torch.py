"""Every name of torch that is not public, looked up once, and what is done where a torch lacks it.

torch may rename these in any version. Without a name that tells when a fast path is safe, the fast path is not taken.
Without one that a transform of `torch.func` needs, plain calls work, and the transform raises RuntimeError.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

MISSING: Any = object()


def found(path: str, default: Any = MISSING) -> Any:
    """Return what a dotted path names, or the default."""
    head, *names = path.split(".")
    thing = importlib.import_module(head)
    for n, name in enumerate(names):
        if not hasattr(thing, name):
            try:
                importlib.import_module(".".join((head, *names[: n + 1])))
            except ImportError:
                return default
        thing = getattr(thing, name, MISSING)
        if thing is MISSING:
            return default
    return thing


def unknown(path: str, purpose: str) -> Any:
    """Raise RuntimeError about a name that is not there."""
    ours = getattr(sys.modules.get("rnnfast"), "__version__", "")
    raise RuntimeError(f"rnnfast {ours} does not know torch {torch.__version__}: {path}, for {purpose}, is not there")


def needed(path: str, purpose: str) -> Any:
    """Return what a dotted path names, or a function that raises RuntimeError."""
    return found(path, lambda *args, **options: unknown(path, purpose))


def always(*args) -> bool:
    """Stand in for a question of which the answer yes is safe."""
    return True


# Whether something stands between a call and the memory of its tensors. If it cannot be told, something does.
is_wrapper: Callable[[Tensor], bool] = found("torch._C._functorch.is_functorch_wrapped_tensor", always)
# Whether a tensor is known to be of zeros without memory.
is_known_zero: Callable[[Tensor], bool] = found("torch.Tensor._is_zerotensor", lambda _: False)
is_zero_tensor: Callable[[Tensor], bool] = found("torch.Tensor._is_zerotensor", always)
is_profiled: Callable[[], bool] = found("torch._C._autograd._profiler_enabled", always)
is_traced: Callable[[], bool] = found("torch._C._is_tracing", always)
# Whether torch.jit.trace is at work.
is_jit_traced: Callable[[], bool] = found("torch._C._is_tracing", torch.jit.is_tracing)
count_dispatch_modes: Callable[[], int] = found("torch._C._len_torch_dispatch_stack", always)
innermost_transform: Callable[[], Any] = found("torch._C._functorch.peek_interpreter_stack", always)
has_transforms: Callable[[], bool] = found("torch._C._are_functorch_transforms_active", always)
# None if there are no hooks on the tensors that are saved for backward.
saving_hooks: Callable[[bool], Any] = found("torch._C._autograd._top_saved_tensors_default_hooks", always)

is_pre_dispatched: Callable[[], bool] = always
if (key := found("torch._C.DispatchKey.PreDispatch", None)) is not None:
    is_pre_dispatched = partial(found("torch._C._dispatch_tls_is_dispatch_key_included", always), key)

# Whether forward mode is on, and whether the backward pass under way asks for the gradient that a node accumulates.
forward_grad_enabled: Callable[[], bool] = found("torch._C._is_fwd_grad_enabled", always)
engine_will_run: Callable[[Any], bool] = found("torch._C._will_engine_execute_node", always)

forward_ad = torch.autograd.forward_ad
if not hasattr(forward_ad, "_current_level"):
    forward_ad = type("forward_ad", (), {"_current_level": 0})  # type: ignore[assignment, misc]


def in_dual_level() -> bool:
    """Say whether a call is inside `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def autocast_of_any_device() -> bool:
    """Say whether autocast is on for a device that torch has names for."""
    return any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda", "xpu", "mps", "hpu"))


is_any_autocast_enabled: Callable[[], bool] = found("torch._C._is_any_autocast_enabled", autocast_of_any_device)

# The operators behind torch.nn.RNN, LSTM and GRU, which torch itself has too.
operators = found("torch._VF", torch)


def assert_now(valid: Tensor, message: str) -> None:
    """Check a tensor of one truth value, waiting for the device."""
    if not valid:
        raise RuntimeError(message)


assert_async: Callable[[Tensor, str], None] = found("torch._assert_async", assert_now)

# Below autograd an operator's own implementation comes next.
below_autograd = needed("torch._C._AutoDispatchBelowAutograd", "calls inside of a transform, a mode or a graph")

# Functions applied past the look at their signature, which takes longer than small layers.
unwrap_dead = found("torch._functorch.utils.unwrap_dead_wrappers", None)
single_level_function = found("torch.autograd.function._SingleLevelFunction", None)
single_level = found("torch._functorch.utils.enable_single_level_autograd_function", nullcontext)


def apply(function: type[torch.autograd.Function], *args) -> tuple[Tensor, ...]:
    """Apply a Function as its own `apply` does."""
    if unwrap_dead is None or has_transforms():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*unwrap_dead(args))  # type: ignore[misc]


def apply_here(function: type[torch.autograd.Function], *args) -> tuple[Tensor, ...]:
    """Apply a Function at the current level of torch.func's transforms, where a dispatched kernel already stands."""
    with single_level():
        return without_levels(function).apply(*args)


@cache
def without_levels(function: type[torch.autograd.Function]) -> Any:
    """Return a Function that is applied at the current level alone: torch's own base of `Function` with its methods."""
    if single_level_function is None:
        return super(torch.autograd.Function, function)
    methods = ("forward", "setup_context", "backward", "jvp")
    return type(function.__name__, (single_level_function,), {name: vars(function)[name] for name in methods})


# The transforms around a call, outermost first.
list_transforms = needed("torch._C._functorch.get_interpreter_stack", "derivatives inside of a transform")
JVP = found("torch._C._functorch.TransformType.Jvp")


def forward_nesting() -> int:
    """Count the `jvp` transforms around a call. A Function's own `jvp` sees the innermost alone."""
    if innermost_transform() is None:
        return 0
    return sum(map(is_jvp, list_transforms() or ()))


def is_jvp(transform) -> bool:
    """Say whether a transform is one of forward mode."""
    if JVP is MISSING:
        unknown("torch._C._functorch.TransformType.Jvp", "derivatives inside of a transform")
    return transform.key() == JVP


# A torch that does not name this transform is taken to be without it.
FUNCTIONALIZE = found("torch._C._functorch.TransformType.Functionalize")


def is_functionalized() -> bool:
    """Say whether `torch.func.functionalize` is around a call: it takes operators, and no Functions."""
    if innermost_transform() is None:
        return False
    return any(each.key() == FUNCTIONALIZE for each in list_transforms() or ())


# The modes around a call that see every operator; none where they cannot be listed.
dispatch_modes: Callable[[], list] = found("torch.utils._python_dispatch._get_current_dispatch_mode_stack", list)
# Has derivatives by forward mode taken, or not, within a block.
set_forward_grad = needed("torch.autograd.forward_ad._set_fwd_grad_enabled", "forward mode over a backward pass")

get_unwrapped = needed("torch._C._functorch.get_unwrapped", "gradients inside of a transform")
# For derivatives by forward mode below the transform; without these, they are taken at its level.
current_transform = found("torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter", None)
unwrap_for_grad = found("torch._C._functorch._unwrap_for_grad", None)
wrap_for_grad = found("torch._C._functorch._wrap_for_grad", None)
lowers = None not in (current_transform, unwrap_for_grad, wrap_for_grad) and JVP is not MISSING

# The kind of vmap, older than torch.func's, behind `torch.autograd.grad(..., is_grads_batched=True)`.
BATCHES = "gradients with is_grads_batched"
is_batched_gradient: Callable[[Tensor], bool] = found("torch._C._functorch.is_legacy_batchedtensor", lambda _: False)
enter_batches = needed("torch._C._vmapmode_increment_nesting", BATCHES)
leave_batches = needed("torch._C._vmapmode_decrement_nesting", BATCHES)
add_batch_dim = needed("torch._add_batch_dim", BATCHES)
remove_batch_dim = needed("torch._remove_batch_dim", BATCHES)


def constant_in_graphs(function: Callable) -> Callable:
    """Do what `torch.compiler.assume_constant_result` does, without importing the compiler, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# What makes the list of weights that torch's layers keep, and brings it up to date.
init_weight_list: Callable[[torch.nn.Module], Any] = found("torch.nn.RNNBase._init_flat_weights", always)
update_weight_list: Callable[[torch.nn.Module], Any] = found("torch.nn.RNNBase._update_flat_weights", always)


# What writes the tensors that a module has registered to a state_dict.
save_registered: Callable[..., None] = needed("torch.nn.Module._save_to_state_dict", "the state_dict of frozen layers")


class WeightNames:
    """The names of a layer's weights in order, for a torch whose layers do not keep them in `_flat_weights_names`."""

    def __get__(self, layer, owner=None) -> list[str]:
        """Work them out; what torch keeps in the instance comes before this."""
        if layer is None:
            return []
        parts = ["weight_ih", "weight_hh"]
        parts += ["bias_ih", "bias_hh"] * bool(layer.bias) + ["weight_hr"] * bool(layer.proj_size)
        suffixes = ("", "_reverse")[: 1 + bool(layer.bidirectional)]
        return [f"{part}_l{n}{suffix}" for n in range(layer.num_layers) for suffix in suffixes for part in parts]


# Public, but only since torch 2.7.
is_exporting: Callable[[], bool] = found("torch.compiler.is_exporting", lambda: False)

# What has a block around each step of a generator, and not around what happens between them.
wrap_generator = needed("torch.utils._contextlib._wrap_generator", "generators decorated by use_backend")
