#include "cluster_configs.h"

namespace fused_rin {
void append_float32_cluster_instances(std::vector<BlockInstance>& instances) { FmaClusterConfigs::append(instances); }
}  // namespace fused_rin
