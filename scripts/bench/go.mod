// Programs of scripts/bench-load.sh: a generator of a foreign archive and a
// meter. A module of its own, so that the product does not build them.
module bench

go 1.26.4
