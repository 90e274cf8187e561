"""Ahead-of-time compilation of the Triton kernels to cubins: needs neither a GPU nor PyTorch.

A cubin's parameters are the kernel's own, constants left out, in order; then pointers to scratch memory that
Triton adds to every kernel (global scratch, profile scratch: triton/backends/nvidia/driver.c). Ours use none,
so the launcher passes null. A kernel that would need scratch, a cluster or a cooperative grid is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CAPABILITIES = (80, 90)
SCRATCH_POINTERS = 2
# Metadata of the launch that a plain `cuLaunchKernel` cannot give, with the value that asks for nothing.
PLAIN = {
    "num_ctas": 1,
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
}


@dataclass(frozen=True)
class Kernel:
    """A Triton function and the types of its parameters, by name and in order ("constexpr" for constants)."""

    function: Any
    signature: Mapping[str, str]
    num_warps: int = 4

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters that are passed at a launch."""
        return {name: kind for name, kind in self.signature.items() if kind != "constexpr"}


@dataclass(frozen=True)
class Cubin:
    """One compiled kernel: ELF image, entry point and what a launch must give.

    A block is `threads` x 1 x 1 with `shared_bytes` of dynamic shared memory; `parameters` counts the
    arguments, scratch pointers included.
    """

    name: str
    capability: int
    image: bytes
    ptx: str
    threads: int
    shared_bytes: int
    parameters: int


def compile_kernel(kernel: Kernel, capability: int, constants: Mapping[str, int]) -> Cubin:
    """`kernel` for sm_<capability> with its constants. FP contraction is off: bit-equality is promised.

    Raises ValueError on a capability below 80, RuntimeError in interpreter mode or for a kernel that a plain
    launch cannot serve.
    """
    if capability < CAPABILITIES[0]:
        raise ValueError(f"capability is {capability}; expected {CAPABILITIES[0]} or later")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton is in interpreter mode; unset TRITON_INTERPRET to compile")
    source = ASTSource(kernel.function, signature=dict(kernel.signature), constexprs=dict(constants))
    built = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": kernel.num_warps, "enable_fp_fusion": False},
    )
    meta, ptx = built.metadata, built.asm["ptx"]
    for key, plain in PLAIN.items():
        found = getattr(meta, key, plain)
        if found != plain:
            raise RuntimeError(f"{meta.name} has {key} = {found}; expected {plain} for a plain launch")
    count = entry_parameters(ptx)
    hidden = count - len(kernel.parameters)
    if hidden not in range(SCRATCH_POINTERS + 1):
        raise RuntimeError(
            f"{meta.name} has {count} parameters; expected {len(kernel.parameters)} and up to "
            f"{SCRATCH_POINTERS} scratch pointers"
        )
    return Cubin(meta.name, capability, built.asm["cubin"], ptx, meta.num_warps * 32, meta.shared, count)


def entry_parameters(ptx: str) -> int:
    """How many parameters the one entry point of `ptx` has."""
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    return len(re.findall(r"\.param\b", entry.group(1))) if entry else 0
