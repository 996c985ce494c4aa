"""Offline jobs: ``/v1/files`` and ``/v1/batches``.

::

    disk.py      changes of a folder that are whole or not there, also after a crash
    files.py     what clients uploaded and what batches made
    uploads.py   one multipart upload, straight to disk
    lines.py     lines of a batch: read, checked, answered
    usage.py     what its answers say that it used
    store.py     all batches, and who runs which
    hold.py      one ingress's hold on one batch: its journal, and its end
    runner.py    the lines of one batch, a few at a time
    asking.py    one line through the same service as an HTTP request
    keeper.py    of one ingress process: takes up batches, keeps its holds alive, lets go
    service.py   what the routes ask
    bodies.py    what callers may send    answers.py   what they get    routes.py   the routes

**One runner per batch.** Every ingress process looks into the common folder about once a second. It takes up a batch by
creating ``lease.N``, with N one above the newest: the file system lets one process create it. The holder writes a
growing number into its lease; when a lease has not changed for ``batches.lease_s`` on the *observer's* monotonic clock,
the observer creates the next one. So no two machines' clocks are compared. In a planned stop the holder writes that its
lease is free, and the next look of any other process takes it. Why not an actor: the folder must be shared
anyway, tokenizer and router are in the ingress already, and there is nothing more to start, to restart or to lose.

**What a lease does not promise.** A process that hung may wake up and go on beside its successor. That costs tokens and
harms nothing: each lease has a journal of its own, which only its holder writes; whoever finishes reads all of them and
takes the first answer of each line; and the end of a batch is one file that can be created once.

**What a crash costs.** A line is answered when its journal entry is on disk. Lines that were running are run again and
charged again: nobody knows how far they had come. What is on disk is never computed again.
"""
