"""Who goes next: costs, counters, backlogs and policies. Standard library only."""
