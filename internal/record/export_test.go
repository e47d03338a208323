package record

// SealForTest writes a record of any version.
func (c *Codec) SealForTest(version byte, path string, body []byte) []byte {
	return c.seal(version, path, body)
}
