"""Refuses sub-interpreters, before NumPy and Numba are touched.

Compiled code and the threads that run it are the process's: they would outlive another
interpreter that had made them.  What Numba compiles may also wait there for the main
interpreter's lock, for ever.
"""

import ctypes

_python = ctypes.pythonapi
_python.PyInterpreterState_Get.restype = ctypes.c_void_p
_python.PyInterpreterState_Main.restype = ctypes.c_void_p

if _python.PyInterpreterState_Get() != _python.PyInterpreterState_Main():
    msg = "fastrelu works in the main interpreter only: its threads outlive any other"
    raise ImportError(msg)
