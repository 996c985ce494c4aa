"""When and where: ledger, leases, capacity and the dispatcher. Standard library only."""
