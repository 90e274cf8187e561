"""The Numba kernels on the shared cases."""

from __future__ import annotations

from kernel_cases import Place, check_counts, check_ks, check_psi, check_ratio_age

from penstock_kernels.cpu import histogram, ks, psi, ratio_age

PLACE = Place(histogram.count_rows, psi.psi_values, ks.ks_bands, ratio_age.ratio_age)


def test_numba_counts() -> None:
    check_counts(PLACE, range(24))


def test_numba_psi() -> None:
    check_psi(PLACE)


def test_numba_ks_bands() -> None:
    check_ks(PLACE, range(40))


def test_numba_ratio_age() -> None:
    check_ratio_age(PLACE, range(24))
