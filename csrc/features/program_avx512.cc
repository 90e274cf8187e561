// The program kernel for x86-64-v4. See program_code.h.
#define PENSTOCK_PROGRAM_KERNEL run_program_avx512
#include "features/program_kernel.h"
