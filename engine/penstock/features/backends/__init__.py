"""Back ends that run programs beside C++: numpy, numba and Triton.

Each has `compile(outputs, schema, distributions)`, whose result has `inputs`, `outputs` and
`run(inputs, rows)` like `_core.FeatureProgram` and gives the same bits.
"""
