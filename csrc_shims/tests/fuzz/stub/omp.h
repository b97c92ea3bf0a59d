// Stands in for OpenMP's header: a fuzz target runs the iterations of a loop one after the other, cut for as many
// threads as its input says.
#pragma once

extern "C" int omp_in_parallel();
extern "C" int omp_get_max_threads();
