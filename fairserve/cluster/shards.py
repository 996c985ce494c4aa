"""The other ranks of a tensor parallel replica: actors in the bundles of its own placement group.

They belong to the replica's actor: Ray ends them with it, however it ends.
"""

from __future__ import annotations

import socket
from typing import Any

from fairserve.config import FairServeArgs


class Shard:
    """One rank but the first."""

    def follow(self, args_json: str, slot: str, number: int, address: str) -> None:
        """Run what rank 0 runs, until it stops or is gone."""
        from fairserve.engine.engine import follow
        from fairserve.engine.shards import Rank
        from fairserve.engine.sizing import num_threads

        whole = FairServeArgs.model_validate_json(args_json)
        args = whole.of_model(slot)
        size = args.engine.tensor_parallel_size
        follow(args.model, args.engine, Rank(number, size, address), num_threads(args, whole))


def start_shards(whole: FairServeArgs, slot: str) -> tuple[str, list[Any]]:
    """Start ranks 1 and up of this model's replica, beside this actor, which becomes rank 0. Returns where they meet,
    host:port, and their actors, which live as long as somebody holds them."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    args = whole.of_model(slot)
    group = ray.util.get_current_placement_group()
    assert group is not None, "a deployment with tensor_parallel_size above 1 has a placement group"
    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        address = f"{host}:{probe.getsockname()[1]}"
    shards = []
    for number in range(1, args.engine.tensor_parallel_size):
        shard = (
            ray.remote(Shard)
            .options(
                num_cpus=args.num_cpus_per_replica,
                num_gpus=args.num_gpus_per_replica,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
            )
            .remote()
        )
        shard.follow.remote(whole.model_dump_json(), slot, number, address)
        shards.append(shard)
    return address, shards


def bundles(args: FairServeArgs) -> dict[str, Any]:
    """The options of the model deployment that give each replica room for all of its ranks."""
    size = args.engine.tensor_parallel_size
    if size == 1:
        return {}
    one = {"CPU": args.num_cpus_per_replica, "GPU": args.num_gpus_per_replica}
    bundle = {name: amount for name, amount in one.items() if amount}
    return {"placement_group_bundles": [bundle] * size, "placement_group_strategy": "STRICT_PACK"}
