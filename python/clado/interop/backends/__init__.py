"""Other tools on our kernels, a file per tool: what is replaced inside it, and under which conditions.

:func:`~clado.interop.backends.switch.backend` puts the replacements in and takes them out; a tool is one line of its registry.
"""
