// The program kernel for x86-64-v3. See program_code.h.
#define PENSTOCK_PROGRAM_KERNEL run_program_avx2
#include "features/program_kernel.h"
