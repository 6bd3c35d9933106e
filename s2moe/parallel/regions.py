"""Labels of the parts of an SMoE layer, as a profiler shows them. See training/layer_times.py.

    @record_function(EXPERTS)
    def forward(...)

They do nothing but a few microseconds' work unless a profiler runs.
"""

DISPATCH = "s2moe::dispatch"  # sorting, gathering and summing rows
ALL_TO_ALL = "s2moe::all_to_all"  # rows on their way between ranks, the exchange of their numbers included
EXPERTS = "s2moe::experts"
