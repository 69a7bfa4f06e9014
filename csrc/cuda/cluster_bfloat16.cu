#include "cluster_configs.h"

namespace fused_rin {
void append_bfloat16_cluster_instances(std::vector<BlockInstance>& instances) {
  MmaClusterConfigs<device::BFloat16>::append(instances);
}
}  // namespace fused_rin
