# SPDX-License-Identifier: Apache-2.0
"""Ways to run the plan of a step, by composition.

``Runner`` holds the ``Windows`` of running requests, the cache and a few ``StepExecutor``s (``base.py``), in order of
preference. Each step goes to the first that takes its plan:

* ``EagerStep``: plain torch operations, any plan, any device. The reference that all others are compared with.
* ``NativeStep``: the C++ library of CPUs, the whole step in one call.
* ``CapturedStep``: our Triton kernels (``DeviceStep``) as CUDA graphs (``StepGraphs``), launched ahead of the host.

To add a way, write a class with the methods of ``StepExecutor`` and name it in ``wedlm.engine.factory``; nothing else
changes. A mere forward is a model for ``EagerStep``; so are the ranks of tensor parallelism (``wedlm.engine.ranks``).
"""
