#include "kd_rows_launch.cuh"

template std::string fastkd::launch_kd_rows<fastkd::float16>(const KDRowsParams&, const Queue&);
