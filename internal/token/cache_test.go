package token

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/pkcs11"
)

// TestKeysThatNobodyAsksForLeaveTheCache by themselves when their time is
// over, one that is in use as soon as it is not any more.
func TestKeysThatNobodyAsksForLeaveTheCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, stop := newCache(8, cacheTime), make(chan struct{})
		var mu sync.Mutex
		var gone []pkcs11.ObjectHandle
		forget := func(k keyPair) {
			mu.Lock()
			defer mu.Unlock()
			gone = append(gone, k.enc)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.tidy(stop, forget)
		}()
		get := func(n byte) *cached {
			k, err := c.get([32]byte{n}, func() (keyPair, error) { return keyPair{enc: pkcs11.ObjectHandle(n)}, nil }, forget)
			if err != nil {
				t.Fatal(err)
			}
			return k
		}
		seen := func(want ...pkcs11.ObjectHandle) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(gone, want) {
				t.Errorf("forgotten: %v, not %v", gone, want)
			}
		}
		c.release(get(1), forget)
		used := get(2)
		time.Sleep(cacheTime / 2)
		c.release(get(3), forget)
		c.release(get(1), forget) // being asked for makes it no younger
		seen()
		time.Sleep(cacheTime/2 + cacheTime/tidyEvery)
		seen(1)
		c.release(used, forget)
		seen(1, 2)
		time.Sleep(cacheTime / 2)
		seen(1, 2, 3)
		close(stop)
		<-done
	})
}
