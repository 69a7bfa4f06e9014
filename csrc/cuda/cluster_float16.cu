#include "cluster_configs.h"

namespace fused_rin {
void append_float16_cluster_instances(std::vector<BlockInstance>& instances) {
  MmaClusterConfigs<device::Float16>::append(instances);
}
}  // namespace fused_rin
