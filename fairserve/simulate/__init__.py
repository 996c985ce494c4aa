"""The same decisions on a virtual clock: workloads, a simulated cluster, measures. No Ray, no torch."""
