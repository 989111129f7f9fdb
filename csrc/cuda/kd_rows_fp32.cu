#include "kd_rows_launch.cuh"

template std::string fastkd::launch_kd_rows<float>(const KDRowsParams&, const Queue&);
