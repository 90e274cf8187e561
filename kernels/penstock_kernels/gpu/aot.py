"""Ahead-of-time compilation of the Triton kernels to cubins: needs neither a GPU nor PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Cubin:
    """One compiled kernel: the ELF image, its entry point and the launch's needs (threads, bytes)."""

    name: str
    capability: int
    image: bytes
    threads: int
    shared_bytes: int


def compile_histogram(capability: int, max_edges: int) -> Cubin:
    """`gpu.histogram.count_kernel` for sm_<capability>, for columns of at most max_edges edges.

    FP contraction is off, as everywhere bit-equality is promised. Raises ValueError on another capability,
    RuntimeError in interpreter mode.
    """
    if capability not in CAPABILITIES:
        raise ValueError(f"capability is {capability}; expected one of {CAPABILITIES}")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton is in interpreter mode; unset TRITON_INTERPRET to compile")
    from penstock_kernels.gpu.histogram import BLOCK, SIGNATURE, count_kernel, search_steps

    constants = {"STEPS": search_steps(max_edges), "BLOCK": BLOCK}
    source = ASTSource(count_kernel, signature=dict(SIGNATURE), constexprs=constants)
    built = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": False},
    )
    meta = built.metadata
    return Cubin(meta.name, capability, built.asm["cubin"], meta.num_warps * 32, meta.shared)
