"""What no compiler writes well: linear layers of few rows and the decode step, in C++ for CPUs of every kind.

The C++ is one source over a small set of vector operations (`vectors.h`). It is compiled for the instruction set of the
CPU at hand (`levels`), once per machine (`build`), and called through ctypes (`native`): it knows nothing of torch.
"""
