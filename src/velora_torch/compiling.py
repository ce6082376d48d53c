"""What ``torch.compile`` is to leave alone."""

import torch

uncompiled = torch._disable_dynamo
"""Decorates a function that is never compiled.

As ``torch.compiler.disable``, which imports the whole compiler when the function is defined (2.4 of
the 5.9 CPU seconds that importing this package took); this one does when it is first called.
"""
