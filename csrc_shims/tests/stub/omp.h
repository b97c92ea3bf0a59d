// Stands in for OpenMP's header where the iterations of a loop are run in order (fuzz targets, with loops cut for as
// many threads as an input says) or by plain threads (ThreadSanitizer). The program defines the functions.
#pragma once

extern "C" int omp_in_parallel();
extern "C" int omp_get_max_threads();
extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();
