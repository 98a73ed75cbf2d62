"""Injects faults into real runs of `fastvlm train`, continues them, and compares them with undisturbed ones.

    python -m tests.faults --minutes 30                       every fault in turn, until the time is over; then a table
    python -m tests.faults --only killed_in_a_save --seed 17  one trial again, as the table or a log names it

A fault is a function (base, folder, rng) -> what happened, in words. It starts child processes in `folder`, disturbs
them as `rng` says, continues them with the same command, and raises Broken where a promise of docs/reliability.md is
not kept. test_faults.py runs a few of them with pytest.

    runs.py       starts runs and continues them        compare.py      reads what they leave behind, compares
    preload.py,c  a library that makes file operations fail or wait, or kills a run at one of them
    kills.py      SIGKILL, SIGTERM                      disks.py        full and failing disks, folders that vanish
    damage.py     bytes flipped, cut, deleted           bad_numbers.py  NaNs and spikes in the data, rates too high
    processes.py  one of two killed, frozen, delayed, cut off
    files.py      files by strangers: mutations.py of originals.py, and watched.py sees what is done about them
"""
