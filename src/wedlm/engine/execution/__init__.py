# SPDX-License-Identifier: Apache-2.0
"""Executors that run the plan of a step, by composition.

``Runner`` holds the ``Windows`` of running requests, the cache and a few ``StepExecutor``s (``base.py``), in order of
preference. Each step goes to the first that accepts its plan:

* ``EagerStep``: plain torch operations, for any plan on any device. It is the reference for all others.
* ``NativeStep``: the C++ library of CPUs, which runs the whole step in one call.
* ``CapturedStep``: our Triton kernels (``DeviceStep``) as CUDA graphs (``StepGraphs``), launched ahead of the host.

To add an executor, write a class with the methods of ``StepExecutor`` and name it in ``wedlm.engine.factory``; nothing
else changes. If you only have another forward, make it a model for ``EagerStep``, as the ranks of tensor parallelism do
(``wedlm.engine.ranks``).
"""
