"""What ``torch.compile`` is to leave alone."""

import torch

uncompiled = torch._disable_dynamo
"""Decorates a function that is never compiled.

As ``torch.compiler.disable``, but imports the compiler when the function is first called, not when
it is defined: `import velora_torch` does without.
"""
