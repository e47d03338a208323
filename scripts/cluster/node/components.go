package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"embed"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

//go:embed config
var configs embed.FS

// cluster is what runs on the node.
type cluster struct {
	dir, bin string
	vars     map[string]string // for the configuration files
	ca       *authority
	http     *http.Client
	stop     context.Context
}

// runComponents starts everything, writes the file "ready", and ends when it
// is told to. Pods are not drained: the PID namespace's end takes them.
func runComponents(dir, bin string) {
	stop, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-stop.Done()
		os.Exit(0) // the kernel kills the rest
	}()
	check(serveNode(dir), "open the relay")
	c := &cluster{dir: dir, bin: bin, stop: stop, vars: map[string]string{
		"dir": dir, "bin": bin, "nodeName": nodeName, "nodeIP": nodeIP, "podCIDR": podCIDR, "dnsIP": dnsIP, "apiServer": apiServer,
	}}
	c.makeCertificates()
	c.startControlPlane()
	c.startContainerd()
	c.waitFor("/readyz", "ok")
	c.startControllers()
	c.startKubelet()
	c.waitFor("/api/v1/namespaces/default/serviceaccounts/default", `"name":"default"`)
	c.waitFor("/api/v1/nodes/"+nodeName, `"reason":"KubeletReady"`)
	c.addVolumes()
	c.kubectl("apply", "-f", c.config("coredns.yaml"))
	c.waitFor("/apis/apps/v1/namespaces/kube-system/deployments/coredns", `"availableReplicas":1`)
	writeFile(dir, "ready", "")
	log.Print("ready")
	select {}
}

// config fills a file of the config folder in and writes it to the work
// folder.
func (c *cluster) config(name string) string {
	b, err := configs.ReadFile("config/" + name)
	check(err, "read %s", name)
	return writeFile(c.dir, "config/"+name, os.Expand(string(b), func(k string) string {
		v, ok := c.vars[k]
		if !ok {
			log.Fatalf("%s: unknown variable %q", name, k)
		}
		return v
	}))
}

// start runs a program for the cluster's life; when it ends before, so does
// the cluster.
func (c *cluster) start(name, program string, args ...string) {
	out, err := os.Create(filepath.Join(c.dir, "log", name+".log"))
	check(err, "make a log")
	cmd := exec.Command(filepath.Join(c.bin, program), args...)
	cmd.Stdout, cmd.Stderr = out, out
	// containerd looks for its shim and runc, kube-proxy for nft, on PATH.
	cmd.Env = append(os.Environ(), "PATH="+c.bin+":/usr/sbin:/usr/bin:/sbin:/bin")
	check(cmd.Start(), "start %s", name)
	log.Printf("started %s", name)
	go func() {
		err := cmd.Wait()
		if c.stop.Err() == nil {
			log.Fatalf("%s ended: %v; see log/%s.log", name, err, name)
		}
	}()
}

func (c *cluster) pki(name string) string        { return filepath.Join(c.dir, "pki", name) }
func (c *cluster) kubeconfig(user string) string { return filepath.Join(c.dir, user+".conf") }

func (c *cluster) makeCertificates() {
	c.ca = newAuthority(c.pki(""), "ca")
	newAuthority(c.pki(""), "front-proxy-ca").issue("front-proxy-client", "front-proxy-client", "")
	c.ca.issue("apiserver", "kube-apiserver", "", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc.cluster.local", "localhost", "127.0.0.1", apiIP, nodeIP)
	c.ca.issue("sa", "service-accounts", "")
	c.ca.issue("apiserver-kubelet-client", "apiserver-kubelet-client", "system:masters")
	for _, u := range []struct {
		name, commonName, org string
		sans                  []string
	}{
		{"admin", "admin", "system:masters", nil},
		{"kubelet", "system:node:" + nodeName, "system:nodes", []string{nodeName, nodeIP, "127.0.0.1"}},
		{"controller-manager", "system:kube-controller-manager", "", nil},
		{"scheduler", "system:kube-scheduler", "", nil},
		{"proxy", "system:kube-proxy", "", nil},
	} {
		c.ca.issue(u.name, u.commonName, u.org, u.sans...)
		c.vars["ca"], c.vars["cert"], c.vars["key"] = c.ca.base64File("ca.crt"), c.ca.base64File(u.name+".crt"), c.ca.base64File(u.name+".key")
		check(os.Rename(c.config("kubeconfig"), c.kubeconfig(u.name)), "write the kubeconfig of %s", u.name)
	}
	pair, err := tls.LoadX509KeyPair(c.pki("admin.crt"), c.pki("admin.key"))
	check(err, "load the administrator's certificate")
	pool := x509.NewCertPool()
	pool.AddCert(c.ca.cert)
	c.http = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}},
	}}
}

func (c *cluster) startControlPlane() {
	c.start("etcd", "kubeall", "etcd", "--data-dir="+c.dir+"/etcd", "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
		"--initial-cluster=default=http://127.0.0.1:2380")
	c.start("kube-apiserver", "kubeall", "kube-apiserver",
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0", "--secure-port=6443", "--advertise-address="+nodeIP,
		"--service-cluster-ip-range="+serviceCIDR, "--allow-privileged=true",
		"--tls-cert-file="+c.pki("apiserver.crt"), "--tls-private-key-file="+c.pki("apiserver.key"), "--client-ca-file="+c.pki("ca.crt"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-signing-key-file="+c.pki("sa.key"), "--service-account-key-file="+c.pki("sa.crt"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		// By name, it would ask a DNS that is not there.
		"--kubelet-preferred-address-types=InternalIP", "--kubelet-certificate-authority="+c.pki("ca.crt"),
		"--kubelet-client-certificate="+c.pki("apiserver-kubelet-client.crt"), "--kubelet-client-key="+c.pki("apiserver-kubelet-client.key"),
		"--requestheader-client-ca-file="+c.pki("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file="+c.pki("front-proxy-client.crt"), "--proxy-client-key-file="+c.pki("front-proxy-client.key"),
		"--shutdown-delay-duration=0s", "--profiling=false")
}

func (c *cluster) startControllers() {
	for name, args := range map[string][]string{
		"controller-manager": {
			"--use-service-account-credentials=true", "--service-account-private-key-file=" + c.pki("sa.key"), "--root-ca-file=" + c.pki("ca.crt"),
			"--cluster-signing-cert-file=" + c.pki("ca.crt"), "--cluster-signing-key-file=" + c.pki("ca.key"),
			"--service-cluster-ip-range=" + serviceCIDR, "--cluster-cidr=" + podCIDR, "--allocate-node-cidrs=false",
		},
		"scheduler": nil,
	} {
		conf := c.kubeconfig(name)
		c.start("kube-"+name, "kubeall", append([]string{
			"kube-" + name, "--kubeconfig=" + conf, "--authentication-kubeconfig=" + conf, "--authorization-kubeconfig=" + conf,
			"--bind-address=127.0.0.1", "--leader-elect=false", "--profiling=false",
		}, args...)...)
	}
}

// startContainerd also imports the cluster's own images, while the API server
// comes up.
func (c *cluster) startContainerd() {
	c.config("cni/bridge.conflist")
	c.start("containerd", "containerd", "--config", c.config("containerd.toml"))
	const socket = "/run/containerd/containerd.sock"
	c.wait(socket, func() error { _, err := os.Stat(socket); return err })
	go func() {
		images, err := filepath.Glob(filepath.Join(c.bin, "images", "*.tar"))
		check(err, "list images")
		for _, i := range images {
			out, err := exec.Command(filepath.Join(c.bin, "ctr"), "--address="+socket, "-n=k8s.io", "images", "import", "--snapshotter=overlayfs", i).CombinedOutput()
			check(err, "import %s: %s", i, out)
		}
	}()
}

func (c *cluster) startKubelet() {
	writeFile(c.dir, "config/resolv.conf", "") // for pods that ask for the node's DNS
	c.start("kubelet", "kubeall", "kubelet", "--config="+c.config("kubelet.yaml"), "--kubeconfig="+c.kubeconfig("kubelet"),
		"--root-dir="+c.dir+"/kubelet", "--hostname-override="+nodeName, "--node-ip="+nodeIP)
	c.start("kube-proxy", "kubeall", "kube-proxy", "--config="+c.config("kube-proxy.yaml"))
}

// addVolumes makes folders of the work folder claimable, by a default storage
// class: enough for all releases of a run, since none is claimed twice.
func (c *cluster) addVolumes() {
	for i := range 96 {
		c.vars["volume"] = strconv.Itoa(i + 1)
		folder := filepath.Join(c.dir, "volumes", c.vars["volume"])
		check(os.MkdirAll(folder, 0o755), "make %s", folder)
		b, err := os.ReadFile(c.config("volume.yaml"))
		check(err, "read volume.yaml")
		writeFile(c.dir, "config/volumes/"+c.vars["volume"]+".yaml", string(b))
	}
	c.kubectl("apply", "-f", c.config("storageclass.yaml"), "-f", filepath.Join(c.dir, "config", "volumes"))
}

func (c *cluster) kubectl(args ...string) {
	out, err := exec.Command(filepath.Join(c.bin, "kubeall"), append([]string{"kubectl", "--kubeconfig=" + c.kubeconfig("admin")}, args...)...).CombinedOutput()
	check(err, "kubectl %s: %s", strings.Join(args, " "), out)
}

// waitFor asks the API server until the answer holds the text.
func (c *cluster) waitFor(path, text string) {
	c.wait(path, func() error {
		r, err := c.http.Get("https://" + apiServer + path)
		if err != nil {
			return err
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		switch {
		case err != nil:
			return err
		case r.StatusCode != http.StatusOK:
			return errors.New(r.Status)
		case !strings.Contains(string(b), text):
			return fmt.Errorf("not yet %s", text)
		}
		return nil
	})
}

// wait has no end of its own: up knows how long the whole may take.
func (c *cluster) wait(what string, done func() error) {
	last := ""
	for {
		err := done()
		if err == nil {
			log.Printf("there: %s", what)
			return
		}
		if s := err.Error(); s != last {
			log.Printf("%s: %s", what, s)
			last = s
		}
		time.Sleep(50 * time.Millisecond)
	}
}
