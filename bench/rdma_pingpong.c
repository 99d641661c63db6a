/* The measured floor for the rdma lane: two processes that write the same bytes to each other with nothing else to do.
 *
 *   rdma_pingpong DEVICE_A DEVICE_B GID_INDEX REQUEST_BYTES RESPONSE_BYTES DEPTH ROUNDS
 *
 * DEPTH requests are under way at a time, each answered by one write; both ends poll. Prints rounds per second. */
#include <arpa/inet.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition) do { if (!(condition)) { perror(#condition); exit(1); } } while (0)
enum { SLOT = 1 << 17, MOST_DEPTH = 16, SIGNAL_EVERY = 16 };

struct end { uint32_t qpn, key; uint64_t address; union ibv_gid gid; };
static struct ibv_cq *cq;
static struct ibv_qp *qp;
static struct ibv_mr *mr;
static char *memory;
static struct end peer;
static unsigned sent;

static void connect_to(const char *name, int gid_index, int socket) {
  int count;
  struct ibv_device **list = ibv_get_device_list(&count);
  struct ibv_context *context = NULL;
  for (int i = 0; i < count; i++)
    if (!strcmp(ibv_get_device_name(list[i]), name)) context = ibv_open_device(list[i]);
  CHECK(context);
  struct ibv_pd *pd = ibv_alloc_pd(context);
  CHECK(cq = ibv_create_cq(context, 1024, NULL, NULL, 0));
  memory = aligned_alloc(4096, 2 * MOST_DEPTH * SLOT);
  memset(memory, 1, 2 * MOST_DEPTH * SLOT);
  CHECK(mr = ibv_reg_mr(pd, memory, 2 * MOST_DEPTH * SLOT, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE));
  struct ibv_qp_init_attr init = {.send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .cap = {128, 128, 1, 1, 256}};
  CHECK(qp = ibv_create_qp(pd, &init));
  struct ibv_port_attr port;
  CHECK(!ibv_query_port(context, 1, &port));
  struct end own = {qp->qp_num, mr->rkey, (uintptr_t)memory, {{0}}};
  CHECK(!ibv_query_gid(context, 1, gid_index, &own.gid));
  CHECK(write(socket, &own, sizeof own) == sizeof own && read(socket, &peer, sizeof peer) == sizeof peer);
  struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_WRITE};
  CHECK(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
  attr = (struct ibv_qp_attr){.qp_state = IBV_QPS_RTR, .path_mtu = port.active_mtu, .dest_qp_num = peer.qpn, .min_rnr_timer = 1,
    .ah_attr = {.is_global = 1, .port_num = 1, .grh = {.dgid = peer.gid, .sgid_index = gid_index, .hop_limit = 64}}};
  CHECK(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                       IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
  attr = (struct ibv_qp_attr){.qp_state = IBV_QPS_RTS, .timeout = 18, .retry_cnt = 6, .rnr_retry = 7};
  CHECK(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                       IBV_QP_MAX_QP_RD_ATOMIC));
}

static void post_receive(void) {
  struct ibv_recv_wr receive = {0}, *bad;
  CHECK(!ibv_post_recv(qp, &receive, &bad));
}

static void write_slot(uint32_t slot, uint32_t bytes) {
  struct ibv_sge piece = {(uintptr_t)memory + (MOST_DEPTH + slot) * (uint64_t)SLOT, bytes, mr->lkey};
  struct ibv_send_wr send = {.sg_list = &piece, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE_WITH_IMM, .imm_data = htonl(slot)}, *bad;
  send.wr.rdma.remote_addr = peer.address + slot * (uint64_t)SLOT;
  send.wr.rdma.rkey = peer.key;
  send.send_flags = (++sent % SIGNAL_EVERY ? 0 : IBV_SEND_SIGNALED) | (bytes <= 256 ? IBV_SEND_INLINE : 0);
  CHECK(!ibv_post_send(qp, &send, &bad));
}

/* The slot of the next message. */
static uint32_t next(void) {
  struct ibv_wc done;
  for (;;) {
    int n = ibv_poll_cq(cq, 1, &done);
    CHECK(n >= 0);
    if (n == 0) continue;
    CHECK(done.status == IBV_WC_SUCCESS);
    if (done.opcode != IBV_WC_RECV_RDMA_WITH_IMM) continue;
    post_receive();
    return ntohl(done.imm_data);
  }
}

int main(int count, char **arguments) {
  CHECK(count == 8);
  int gid_index = atoi(arguments[3]), depth = atoi(arguments[6]), rounds = atoi(arguments[7]);
  uint32_t request = atoi(arguments[4]), response = atoi(arguments[5]);
  CHECK(depth >= 1 && depth <= MOST_DEPTH && request <= SLOT && response <= SLOT);
  int sockets[2];
  CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
  pid_t child = fork();
  if (child == 0) prctl(PR_SET_PDEATHSIG, SIGKILL);
  int socket = sockets[child == 0];
  connect_to(arguments[child == 0 ? 2 : 1], gid_index, socket);
  for (int i = 0; i < 64; i++) post_receive();
  char byte = 0;
  CHECK(write(socket, &byte, 1) == 1 && read(socket, &byte, 1) == 1);
  if (child == 0)
    for (;;) write_slot(next(), response);
  struct timespec begin, end;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  for (int i = 0; i < depth; i++) write_slot(i, request);
  for (int i = 0; i < rounds; i++) {
    uint32_t slot = next();
    if (i + depth < rounds) write_slot(slot, request);
  }
  clock_gettime(CLOCK_MONOTONIC, &end);
  printf("%.1f\n", rounds / ((end.tv_sec - begin.tv_sec) + (end.tv_nsec - begin.tv_nsec) * 1e-9));
  kill(child, SIGKILL);
  waitpid(child, NULL, 0);
  return 0;
}
