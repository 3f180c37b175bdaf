"""What setup.py stands on: the tools of the build, the plan of what is compiled, and the record of what was built.

toolchain.py    finds the C++ compiler, nvcc, torch, pybind11 and ninja, and says in one sentence what is missing
plan.py         the ninja file: sources, flags, objects, libraries
record.py       genkern/_build.json and the lines at the end of a build
"""
